"""Dropout: one mask, that of functional.dropout_mask, whatever the path, and its gradients."""

import math

import pytest
import torch
from cases import bounds, excess, given
from torch.utils.checkpoint import checkpoint

from mmca_ext import functional

from .common import Problem, assert_same_bits, different, everything, qkv, randn, same_bits

P = 0.4
Z = 65536 / (65536 - round(65536 * P))


def seeded(seed=9):
    """A generator, and the (seed, offset) the operators draw from it."""
    state = torch.randint(0, 2**62, (2,), generator=torch.Generator().manual_seed(seed))
    return torch.Generator().manual_seed(seed), state.tolist()


@pytest.mark.parametrize("q_len", [3, 50, 210])
@pytest.mark.parametrize("causal", [False, True])
def test_weights_are_dropped_by_the_exported_mask(isa, q_len, causal, dtype):
    """With the identity as values, the output is the dropped weights, and with the identity as dO so is dV's transpose:
    forward and backward of every tile size, with grouped heads and padding."""
    k_len = 220
    query, key, _ = qkv(q_len, k_len, dim=4, dtype=dtype)
    value = torch.eye(k_len, dtype=dtype).expand(2, 2, k_len, k_len).clone().requires_grad_()
    key_mask = torch.arange(k_len) != 5
    generator, (seed, offset) = seeded()
    out = functional.attention(
        query, key, value, dropout_p=P, is_causal=causal, key_mask=key_mask.expand(2, -1), generator=generator
    )
    kept = functional.dropout_mask(2, 4, q_len, k_len, P, seed, offset)
    visible = torch.ones(q_len, k_len, dtype=torch.bool).tril(k_len - q_len) if causal else torch.ones(q_len, k_len)
    assert torch.equal(out != 0, kept & visible.bool() & key_mask)
    for row in range(0, q_len, max(1, q_len // 5)):
        grad = torch.zeros_like(out)
        grad[:, 1, row] = 1
        (gradient,) = torch.autograd.grad(out, value, grad, retain_graph=True)
        assert torch.equal(gradient[:, 0, :, 0] != 0, out[:, 1, row] != 0)


def by_hand(case, mask):
    """Attention of this mask and its gradients, by autograd in float64: softmax, times the mask, times the values."""
    tensors = [t.double().detach().requires_grad_() for t in (case.query, case.key, case.value)]
    query, key, value = tensors[0], *(t.repeat_interleave(case.share, 1) for t in tensors[1:])
    scores = query @ key.mT * case.head_dim**-0.5
    visible, total = case.visible(), []
    for group in visible:
        weights = scores.masked_fill(~group, -math.inf).masked_fill(~group.any(-1, True), 0).softmax(-1)
        total.append((weights * group * mask * Z) @ value)
    gate = case.kwargs.get("gate")
    gate = torch.ones(len(total)) if gate is None else gate.double().detach().requires_grad_()
    out = sum(gate[..., g : g + 1] * o for g, o in enumerate(total))
    wanted = tensors + ([gate] if gate.requires_grad else [])
    gradients = torch.autograd.grad(out, wanted, case.grad_out.double())
    return dict(zip(("out", "d_query", "d_key", "d_value", "d_gate"), (out.detach(), *gradients)))


@pytest.mark.parametrize("q_len, k_len", [(4, 40), (40, 50), (130, 300)])
@pytest.mark.parametrize("how", ["causal", "mmca", "gate"])
def test_gradients_are_those_of_the_exported_mask(isa, q_len, k_len, how, dtype):
    query, key, value = qkv(q_len, k_len, dtype=dtype)
    arguments, op = Problem(query=query, key=key, value=value, dropout_p=P), "attention"
    if how == "causal":
        arguments["is_causal"] = True
    else:
        op = "mmca_attention"
        ids = torch.randint(0, 3, (2, k_len), generator=torch.Generator().manual_seed(6))
        arguments.update(modality=ids, image_rows="causal")
        if how == "gate":
            arguments.update(merge="gate", gate=randn(2, 4, q_len, 2, seed=7, dtype=dtype))
    generator, (seed, offset) = seeded()
    grad = randn(2, 4, q_len, 12, seed=4, dtype=dtype)
    statistic = torch.float64 if dtype == torch.float64 else torch.float32
    groups = () if how == "causal" else (2,)
    actual = everything({**arguments, "generator": generator}, [grad, torch.zeros(*groups, 2, 4, q_len).to(statistic)])
    case = given(
        op, query, key, value, grad, **{n: x for n, x in arguments.items() if n not in ("query", "key", "value")}
    )
    exact = by_hand(case, functional.dropout_mask(2, 4, q_len, k_len, P, seed, offset))
    names = {"out": "out", "d_query": "dq", "d_key": "dk", "d_value": "dv", "d_gate": "dg"}
    bound = bounds(case, {names[name]: t for name, t in exact.items()})
    for name, t in exact.items():
        ratio, place = excess(actual[name], t, bound[names[name]])
        assert ratio <= 1, (name, ratio, place)


@pytest.mark.parametrize("mmca", [False, True])
def test_packed_sequences_take_their_own_part_of_the_mask(isa, mmca, dtype):
    """Sequence n of a packed call is batch n of the mask, its rows and keys counted from its own start."""
    lengths = [7, 0, 30, 12]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    tokens = int(offsets[-1]) + 2
    query, key = (randn(tokens, h, 4, seed=s, dtype=dtype) for h, s in ((4, 1), (2, 2)))
    value = torch.zeros(tokens, 2, 30, dtype=dtype)
    for begin, n in zip(offsets.tolist(), lengths):
        value[begin : begin + n, :, :n] = torch.eye(n, dtype=dtype)[:, None]
    generator, (seed, offset) = seeded()
    if mmca:
        ids = torch.ones(tokens, dtype=torch.int64)
        out = functional.mmca_attention(query, key, value, ids, cu_seqlens=offsets, dropout_p=P, generator=generator)
    else:
        sides = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
        out = functional.attention(query, key, value, **sides, is_causal=True, dropout_p=P, generator=generator)
    for n, (begin, length) in enumerate(zip(offsets.tolist(), lengths)):
        kept = functional.dropout_mask(n + 1, 4, length, length, P, seed, offset)[n].tril()
        weights = out[begin : begin + length].transpose(0, 1)
        assert torch.equal(weights[..., :length] != 0, kept) and not weights[..., length:].any()


def test_own_values_of_image_rows_are_not_dropped(isa, dtype):
    query, key, value = qkv(30, 30, dtype=dtype)
    ids = torch.full((2, 30), 2)
    for p in (0.5, 1.0):
        out = functional.mmca_attention(query, key, value, ids, dropout_p=p)
        assert same_bits(out, value.repeat_interleave(2, 1))


@pytest.mark.parametrize("p", [1.0, 0.9999, 1e-5, 1e-6])
def test_probabilities_at_the_ends(isa, p, dtype):
    """All dropped is zero with zero gradients; below 1 / 131072 nothing is."""
    query, key, value = qkv(20, 130, dtype=dtype)  # few keys without dropout have a kernel of their own, and other bits
    results = everything(Problem(query=query, key=key, value=value, dropout_p=p))
    assert all(t.isfinite().all() for t in results.values())
    plain = everything(Problem(query=query, key=key, value=value))
    assert same_bits(results["lse"], plain["lse"])
    if p == 1.0:
        assert not results["out"].any() and not results["d_value"].any()
    if p == 1e-6:
        assert_same_bits(results, plain)


@pytest.mark.parametrize("how", ["attention", "mmca"])
def test_replay(isa, how, dtype):
    """The same generator state: the same bits, on one thread as on two. Another state: another mask."""
    query, key, value = qkv(130, 300, dtype=dtype)
    arguments = Problem(query=query, key=key, value=value, dropout_p=P)
    if how == "mmca":
        arguments.update(modality=torch.arange(600).view(2, 300) % 3, image_rows="causal")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            results.append(everything({**arguments, "generator": seeded()[0]}))
    finally:
        torch.set_num_threads(before)
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])
    other = different(everything({**arguments, "generator": seeded(10)[0]}), results[0])
    assert set(other) == {"out", "d_query", "d_key", "d_value"}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_mask(isa, reentrant, dtype):
    tensors = qkv(20, 30, value_dim=8, dtype=dtype)
    ids = torch.randint(0, 3, (2, 30), generator=torch.Generator().manual_seed(6))

    def block(query, key, value):
        out = functional.attention(query, key, value, dropout_p=P, is_causal=True)
        return out + functional.mmca_attention(out, key, value, ids, image_rows="causal", dropout_p=P)

    results = []
    for run in (block, lambda *t: checkpoint(block, *t, use_reentrant=reentrant)):
        torch.manual_seed(5)
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = run(*leaves)
        out.sin().sum().backward()
        results.append([out.detach(), *(t.grad for t in leaves)])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    torch.manual_seed(6)
    assert not torch.equal(block(*tensors), results[0][0])
