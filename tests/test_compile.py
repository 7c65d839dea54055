"""torch.compile and torch.export: one graph, right gradients, no recompilation for lengths, fake results like real."""

import pytest
import torch
from operators import BACKWARD, FORWARD, PROBLEMS, arguments, bias, finite, forward, gate, problem, qkv, randn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from mmca_ext import functional

f32, bf16 = torch.float32, torch.bfloat16


def modality(*shape):
    return torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- functions, and their arguments for a length


def both(query, key, value, ids):
    out, lse = functional.attention(query, key, value, is_causal=True, window=(5, None), return_lse=True)
    return out + functional.mmca_attention(query, key, value, ids, image_rows="block"), lse


def with_bias(query, key, value, attn_mask):
    return functional.attention(query, key, value, attn_mask, is_causal=True, softcap=2.0, return_lse=True)


def packed(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    return functional.attention(
        query,
        key,
        value,
        is_causal=True,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        return_lse=True,
    )


def packed_mmca(query, key, value, ids, cu_seqlens, max_seqlen):
    return functional.mmca_attention(query, key, value, ids, merge="none", cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)


def gated(query, key, value, ids, weights):
    return functional.mmca_attention(query, key, value, ids, merge="gate", gate=weights.tanh(), return_lse=True)


def apart(query, key, value, ids):
    return functional.mmca_attention(query, key, value, ids, merge="none", image_rows="causal")


def half(query, key, value, ids):
    return functional.attention(query, key, value, key_mask=ids > 0, return_lse=True)


def under_autocast(query, key, value, attn_mask):
    with torch.autocast("cpu", dtype=bf16):
        return functional.attention(query, key, value, attn_mask, return_lse=True)


def tensors(length, dtype=f32, batch=3, **kwargs):
    """Sizes that differ in every dimension: the compiler would take equal ones for the same symbol."""
    return [t.requires_grad_() for t in qkv(batch, 4, 2, k_len=length, dim=8, value_dim=5, dtype=dtype, **kwargs)]


FUNCTIONS = {
    "both": (both, lambda n: (*tensors(n, q_len=6), modality(3, n))),
    "heads inside rows": (both, lambda n: (*tensors(n, q_len=6, rows=True), modality(3, n))),
    "bias": (with_bias, lambda n: (*tensors(n, q_len=6), bias(4, 6, n, dtype=f32).requires_grad_())),
    "packed": (
        packed,
        lambda n: (
            *tensors(n, q_len=2 * n, batch=None),
            *(torch.tensor([0, 3, 3, 2 * n - 1]), torch.tensor([0, 1, 4, n]), 2 * n - 4, n + 1),
        ),
    ),
    "packed mmca": (
        packed_mmca,
        lambda n: (*tensors(n, q_len=n, batch=None), modality(n), torch.tensor([0, 2, n - 1]), n - 3),
    ),
    "gate": (
        gated,
        lambda n: (*tensors(n, q_len=6), modality(3, n), gate(4, 1, 2, dtype=f32).requires_grad_()),
    ),
    "gate of every row": (
        gated,
        lambda n: (*tensors(n, q_len=6), modality(3, n), gate(3, 4, 6, 2, dtype=f32).requires_grad_()),
    ),
    "none": (apart, lambda n: (*tensors(n, q_len=n, rows=True), modality(3, n))),
    "bf16": (half, lambda n: (*tensors(n, bf16, q_len=6), modality(3, n))),
    "autocast": (under_autocast, lambda n: (*tensors(n, q_len=6), bias(6, n, dtype=f32).requires_grad_())),
}
LENGTHS = (9, 12, 17, 31)


def results_and_gradients(function, args):
    results = function(*args)
    wanted = [t for t in args if isinstance(t, torch.Tensor) and t.requires_grad]
    loss = sum(finite(r.float()).sin().sum() for r in results)
    return results, torch.autograd.grad(loss, wanted)


def assert_same(compiled, function, args):
    actual, expected = results_and_gradients(compiled, args), results_and_gradients(function, args)
    torch.testing.assert_close(actual, expected)
    for found, other in zip(actual, expected, strict=True):
        assert [t.stride() for t in found] == [t.stride() for t in other]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


# ---------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dynamic", [False, True, None])
def test_one_graph_with_gradients(name, dynamic):
    function, args = FUNCTIONS[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in LENGTHS[: 2 if dynamic is False else 4]:
        assert_same(compiled, function, args(length))


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_inductor(name):
    function, args = FUNCTIONS[name]
    compiled = torch.compile(function, fullgraph=True, backend="inductor")
    for length in LENGTHS[:2]:
        assert_same(compiled, function, args(length))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_lengths_do_not_recompile(name):
    """Nor do the values of max_seqlen."""
    function, args = FUNCTIONS[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    compiled(*args(LENGTHS[0]))
    graphs = counter.frame_count
    for length in LENGTHS[1:]:
        results_and_gradients(compiled, args(length))
    assert counter.frame_count == graphs


def test_batches_do_not_recompile():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(both, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for batch in (3, 7, 5):
        assert_same(compiled, both, (*tensors(12, batch=batch, q_len=6), modality(batch, 12)))
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3


def test_wrong_arguments_are_refused_in_a_graph():
    """Values are checked when it runs, shapes too: no result of a graph that was made for others."""
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager", dynamic=True)
    args = list(FUNCTIONS["packed"][1](9))
    compiled(*args)
    args[3] = torch.tensor([0, 5, 3, 18])
    with pytest.raises(ValueError, match="cu_seqlens_q must not decrease, got 3 after 5"):
        compiled(*args)
    args = list(FUNCTIONS["packed"][1](9))
    args[5] = 3
    with pytest.raises(ValueError, match="max_seqlen_q must be at least the longest sequence's 14 tokens, got 3"):
        compiled(*args)


def test_dropout_draws_anew_in_a_graph():
    def function(query, key, value):
        return functional.attention(query, key, value, dropout_p=0.5)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    args = tensors(9, q_len=6)
    runs = []
    for f, seed in ((compiled, 5), (function, 5), (compiled, 6)):
        torch.manual_seed(seed)
        runs.append((f(*args), f(*args)))
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][0], runs[0][1]) and not torch.equal(runs[0][0], runs[2][0])


def test_double_backward_of_a_graph_is_a_named_error():
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    args = FUNCTIONS["both"][1](9)
    (first,) = torch.autograd.grad(compiled(*args)[0].square().sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        first.square().sum().backward()


# ---------------------------------------------------------------- torch.export

LENGTH = torch.export.Dim("length", min=7, max=100)
EXPORTED = {
    "both": ({}, {2: LENGTH}, {2: LENGTH}, {1: LENGTH}),
    "bias": ({}, {2: LENGTH}, {2: LENGTH}, {2: LENGTH}),
    "none": ({2: LENGTH}, {2: LENGTH}, {2: LENGTH}, {1: LENGTH}),
    "gate": ({}, {2: LENGTH}, {2: LENGTH}, {1: LENGTH}, {}),
    "bf16": ({}, {2: LENGTH}, {2: LENGTH}, {1: LENGTH}),
    "packed mmca": ({0: LENGTH}, {0: LENGTH}, {0: LENGTH}, {0: LENGTH}, {}, None),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", EXPORTED)
def test_export(name, strict):
    function, make = FUNCTIONS[name]

    class Block(torch.nn.Module):
        def forward(self, *args):
            return function(*args)

    def args(length):
        values = [t.detach() if isinstance(t, torch.Tensor) else t for t in make(length)]
        return (*values[:-1], 40) if name == "packed mmca" else tuple(values)  # max_seqlen is a constant here

    program = torch.export.export(Block(), args(9), dynamic_shapes=(EXPORTED[name],), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "mmca_ext.attention.default" in targets
    for length in (9, 31):
        for actual, expected in zip(program.module()(*args(length)), function(*args(length)), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# ---------------------------------------------------------------- fake results


def fake(op, args):
    with FakeTensorMode() as mode:
        return op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))


def assert_fake_is_real(op, args):
    for i, (real, other) in enumerate(zip(op(*args), fake(op, args), strict=True)):
        assert (real.shape, real.dtype, real.stride()) == (other.shape, other.dtype, other.stride()), i


@pytest.mark.parametrize("dtype", [f32, bf16, torch.float64])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("name", PROBLEMS)
def test_fake_results_have_the_real_layout(name, rows, dtype):
    given = problem(name, dtype=dtype, rows=rows, requires_grad=())
    for save in (False, True):
        assert_fake_is_real(FORWARD, arguments(FORWARD, **given, save_for_backward=save))
    results = dict(zip(("out", "lse", "lse_low", "group_out"), forward(True, **given)))
    lse = results["lse"]
    backward = {"grad_out": torch.ones_like(results["out"]), **results, **given}
    for grad_lse in (None, torch.ones_like(lse), lse.new_ones(()).expand_as(lse), torch.ones_like(lse.mT).mT):
        for wanted in (False, True):
            more = {"grad_lse": grad_lse, "attn_mask_gradient": wanted}
            assert_fake_is_real(BACKWARD, arguments(BACKWARD, **backward, **more))


@pytest.mark.parametrize("dtype", [f32, bf16, torch.float64])
@pytest.mark.parametrize("name", ["bias and all", "bias (2, 4, 5, 1)", "mmca causal gate", "mmca packed gate"])
def test_fake_gradients_have_the_dtype_of_their_argument(name, dtype):
    given = problem(name, dtype=torch.float16, requires_grad=())
    for argument in ("attn_mask", "gate"):
        if argument in given:
            given[argument] = given[argument].to(dtype)
    results = dict(zip(("out", "lse", "lse_low", "group_out"), forward(True, **given)))
    backward = {"grad_out": torch.ones_like(results["out"]), **results, **given, "attn_mask_gradient": True}
    assert_fake_is_real(BACKWARD, arguments(BACKWARD, **backward))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "features"])
@pytest.mark.parametrize("name", ["bias (4, 5, 7)", "mmca causal none", "mmca self gate"])
def test_fake_results_of_other_layouts(name, layout):
    given = problem(name, dtype=f32, requires_grad=())
    for argument in ("query", "key", "value", "attn_mask", "gate"):
        t = given.get(argument)
        if t is None:
            continue
        if layout == "transposed":
            given[argument] = t.mT.contiguous().mT
        elif layout == "sliced":
            given[argument] = torch.stack((t, t), -1)[..., 0]
        elif layout == "expanded":
            given[argument] = t[..., :1, :].expand_as(t)
        else:
            given[argument] = t.movedim(-1, 0).contiguous().movedim(0, -1)
    assert_fake_is_real(FORWARD, arguments(FORWARD, **given))
    results = dict(zip(("out", "lse", "lse_low", "group_out"), forward(True, **given)))
    for grad_out in (torch.ones_like(results["out"]), randn(*results["out"].mT.shape, dtype=f32).mT):
        backward = {"grad_out": grad_out, **results, **given, "attn_mask_gradient": True}
        assert_fake_is_real(BACKWARD, arguments(BACKWARD, **backward))
