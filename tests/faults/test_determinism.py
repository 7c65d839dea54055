"""My rows are mine: bit for bit the same in every run, on any number of threads, next to any neighbours.

MMCA_EXT_SOAK_REPEATS says how often: 20 times in `make test`, 2,000 times in `make soak`.
"""

import os

import devices
import pytest
import torch

from mmca_ext import functional

from .common import (
    FEATURES,
    NAN,
    ROWS,
    SIZES,
    Problem,
    assert_same_bits,
    different,
    everything,
    few_rows,
    problem,
    qkv,
    randn,
    same_bits,
)

REPEATS = int(os.environ.get("MMCA_EXT_SOAK_REPEATS", "20"))
# Of each dtype: every feature once, on sizes that cut the work in several ways.
SAMPLE = {
    torch.float64: ("plain", "bias", "packed"),
    torch.float32: ("masks", "dropout", "block gate", "causal lse", "softcap"),
    torch.bfloat16: ("bias", "self+text none", "packed mmca"),
    torch.float16: ("window", "mmca dropout", "self sum"),
}
DENSE = [feature for feature in FEATURES if not feature.startswith("packed")]


def mine(name, tensor, arguments):
    """What belongs to sequence 1 of a batch of three."""
    if "cu_seqlens" in arguments or "cu_seqlens_q" in arguments:
        keys = arguments.get("cu_seqlens_k", arguments.get("cu_seqlens"))
        rows = arguments.get("cu_seqlens_q", keys)
        begin, end = (keys if name in ("d_key", "d_value", "key", "value", "modality") else rows)[1:3].tolist()
        return tensor[..., begin:end] if name.endswith("lse") else tensor[begin:end]
    none = arguments.get("merge") == "none"
    if "modality" in arguments and (name.endswith("lse") or (name.endswith("out") and none)):
        return tensor[:, 1]
    return tensor[1]


def spoil(arguments, how):
    """Other neighbours, in place: NaN, numbers a million times as large, or other tokens; never sequence 1."""
    for name, tensor in arguments.items():
        if not torch.is_tensor(tensor) or name.startswith("cu_") or len(tensor) < 3:
            continue
        own = mine(name, tensor, arguments).clone()
        if tensor.is_floating_point():
            tensor.fill_(NAN) if how == 0 else tensor.mul_(100.0)
        elif tensor.dtype == torch.bool:
            tensor.fill_(how == 0)
        else:
            tensor.fill_(how + 1)
        mine(name, tensor, arguments).copy_(own)
    return arguments


def with_three(feature, dtype, size):
    """A problem of three sequences, with whatever is per sequence in its masks and biases."""
    return problem(feature, dtype, *SIZES[size], batch=3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("how", [0, 1])
def test_neighbours_in_the_batch_have_no_influence(isa, size, feature, how, dtype):
    arguments = with_three(feature, dtype, size)
    expected = everything(arguments)
    actual = everything(spoil(arguments.copy(), how))
    for name, tensor in expected.items():
        if name in ("d_attn_mask", "d_gate") and len(tensor) != 3:
            continue  # shared by the batch: it is the neighbours', too
        assert same_bits(mine(name, actual[name], arguments), mine(name, tensor, arguments)), name


@pytest.mark.parametrize("feature", [feature for feature in DENSE if "dropout" not in feature])
def test_a_batch_is_its_samples(isa, feature, dtype):
    """Sequence 1 by itself, in a batch of one: the same forward. (Dropout numbers the sequences of a batch.)"""
    arguments = with_three(feature, dtype, "one tile")
    out, lse = (everything(arguments)[name] for name in ("out", "lse"))
    alone = Problem(arguments)
    for name, tensor in arguments.items():
        if torch.is_tensor(tensor) and len(tensor) == 3:
            alone[name] = tensor[1:2]
    results = everything(alone)
    assert same_bits(results["out"].squeeze(-4), mine("out", out, arguments))
    assert same_bits(results["lse"].squeeze(-3), mine("lse", lse, arguments))


@pytest.mark.parametrize("tokens", [1, 3, 8, 20])
def test_the_lengths_of_neighbours_have_no_influence(tokens, dtype):
    """A packed sequence between others, and by itself. No instruction set is forced: the choice of the kernel must not
    go by the number of all tokens."""
    query, key, value = (randn(tokens + 40, h, 8, seed=s, dtype=dtype) for h, s in ((4, 1), (2, 2), (2, 3)))
    results = []
    for before, after in ((0, 0), (1, 0), (0, 2), (6, 6), (20, 20)):
        own = slice(20 - before, 20 + tokens + after)
        offsets = torch.tensor([0, before, before + tokens, before + tokens + after])
        arguments = Problem(zip(("query", "key", "value"), (t[own] for t in (query, key, value)), strict=True))
        found = everything({**arguments, "cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "is_causal": True})
        mine = slice(before, before + tokens)
        results.append({name: found[name][mine] for name in ("out", "inferred_out")})
    for other in results[1:]:
        assert_same_bits(other, results[0])


@pytest.mark.parametrize("rows", ROWS)
def test_other_heads_have_no_influence(isa, rows, dtype):
    query, key, value = qkv(40, 50, dtype=dtype)
    ids = torch.randint(0, 4, (2, 50), generator=torch.Generator().manual_seed(6))
    for arguments in (
        Problem(query=query, key=key, value=value, is_causal=True),
        Problem(query=query, key=key, value=value, modality=ids, image_rows=rows),
    ):
        expected, changed = everything(arguments), arguments.copy()
        for name, own in (("query", [0, 1]), ("key", [0]), ("value", [0])):
            others = [h for h in range(changed[name].shape[1]) if h not in own]
            changed[name][:, others] = NAN
        actual = everything(changed)
        for name, head in (("out", slice(0, 2)), ("d_query", slice(0, 2)), ("d_key", 0), ("d_value", 0)):
            assert same_bits(actual[name][:, head], expected[name][:, head]), name


def find_differences(arguments, repeats, run=everything):
    """Runs over and over: threads 1..4 in turn, neighbours changed every other time; (run, names) that differ."""
    before = torch.get_num_threads()
    changed = [arguments, spoil(arguments.copy(), 0), spoil(arguments.copy(), 1)]
    torch.set_num_threads(1)
    expected = [run(a) for a in changed]
    found = []
    try:
        for number in range(repeats):
            torch.set_num_threads(number % 4 + 1)
            which = (0, 1, 0, 2)[number // 4 % 4]
            actual = run(changed[which])
            found += [(number, name) for name in different(actual, expected[which])]
            own = [name for name in actual if name not in ("d_attn_mask", "d_gate") or len(actual[name]) == 3]
            found += [
                (number, name, "neighbours")
                for name in own
                if not same_bits(mine(name, actual[name], arguments), mine(name, expected[0][name], arguments))
            ]
    finally:
        torch.set_num_threads(before)
    return found


@pytest.mark.parametrize("dtype, feature", [(dtype, feature) for dtype in SAMPLE for feature in SAMPLE[dtype]])
@pytest.mark.parametrize("size", [(40, 50), (100, 420)])
def test_bits_are_the_same_every_time(dtype, feature, size):
    arguments = problem(feature, dtype, *size, batch=3)
    assert not find_differences(arguments, REPEATS)


@pytest.mark.parametrize("victim", ["out", "d_key"])
def test_a_single_bit_would_be_found(victim):
    """The check can fail: one last bit of one element, in one run of twenty."""
    calls = 0

    def almost(arguments):
        nonlocal calls
        calls += 1
        results = everything(arguments)
        if calls == 12:
            number = results[victim].flatten()[:1].view(torch.int32)
            number ^= 1
        return results

    found = find_differences(problem("causal", torch.float32, 40, 50, batch=3), 20, almost)
    assert found and {name for _, name, *_ in found} == {victim}


def test_results_that_depend_on_neighbours_would_be_found():
    """The check can fail: an attention whose rows are centred over the batch."""

    def mixed(arguments):
        results = everything(arguments)
        return {**results, "out": results["out"] - results["out"].nan_to_num().mean(0, keepdim=True)}

    found = find_differences(problem("causal", torch.float32, 40, 50, batch=3), 20, mixed)
    assert any("neighbours" in entry for entry in found)


def test_forward_alone_is_the_forward_of_training(isa, dtype):
    """Without a gradient to save for, results are as exact, and the same every time (few rows take another way)."""
    for size in SIZES.values():
        query, key, value = qkv(*size, dtype=dtype)
        alone = [functional.attention(query, key, value, attn_mask=randn(*size, seed=7)) for _ in range(2)]
        assert same_bits(*alone)
        with torch.enable_grad():
            leaf = query.requires_grad_()
            training = functional.attention(leaf, key, value, attn_mask=randn(*size, seed=7)).detach()
        assert same_bits(training, alone[0]) or few_rows(query, key)  # these are held to the bound by in_bound


def test_rows_that_train_are_the_same_among_few_and_many(isa, dtype):
    """Few rows take their own way only where no backward follows, which computes scores the common way: else a weight
    would be off by the difference of the two (test_weights_of_the_backward_are_those_of_the_forward)."""
    if devices.current != "cpu" and dtype.itemsize == 2:
        pytest.skip("few rows have a kernel of their own on a GPU, and its lse is what their backward takes")
    query, key, value = qkv(40, 300, dtype=dtype)
    many = everything(Problem(query=query, key=key, value=value))
    few = everything(Problem(query=query[:, :, :4].contiguous(), key=key, value=value))
    for name in ("out", "lse"):
        assert same_bits(few[name], many[name][:, :, :4]), name


def test_repeats_are_assertable():
    """The helper that all of this rests on: it takes two different tensors for different, and NaN for NaN."""
    a = {"x": torch.tensor([1.0, NAN])}
    assert_same_bits(a, {"x": a["x"].clone()})
    for other in (torch.tensor([1.0, 0.0]), torch.tensor([1.0 + 2**-23, NAN]), torch.tensor([1.0, NAN]).double()):
        with pytest.raises((AssertionError, RuntimeError)):
            assert_same_bits(a, {"x": other})
    with pytest.raises(AssertionError):
        assert_same_bits({"x": torch.tensor([0.0]).half()}, {"x": torch.tensor([-0.0]).half()})
