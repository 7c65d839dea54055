"""Whichever of query, key, value, bias and gate need a gradient: theirs are right, the others have none."""

from itertools import combinations

import pytest
import torch

from mmca_ext import functional

from .common import Problem, call, everything, in_bound, problem, qkv, randn, same_bits

pytestmark = pytest.mark.usefixtures("isa")


def subsets(names):
    return [c for n in range(1, len(names) + 1) for c in combinations(names, n)]


CASES = [
    (feature, wanted)
    for feature, extra in (("bias", ["attn_mask"]), ("block gate", ["gate"]), ("packed", []), ("self+text none", []))
    for wanted in subsets(["query", "key", "value", *extra])
]


@pytest.mark.parametrize("feature, wanted", CASES, ids=lambda x: x if isinstance(x, str) else "+".join(x))
@pytest.mark.parametrize("arrives", ["out", "lse", "both"])
def test_every_subset(feature, wanted, arrives, dtype):
    """The bits of a gradient do not depend on which others are asked for."""
    arguments = problem(feature, dtype, 20, 30)
    leaves = {name: arguments[name].detach().requires_grad_(name in wanted) for name in arguments.differentiable()}
    every = {name: arguments[name].detach().requires_grad_() for name in arguments.differentiable()}
    losses = []
    for tensors in (leaves, every):
        out, lse = call({**arguments, **tensors})
        weights = randn(*out.shape, seed=4, dtype=out.dtype), randn(*lse.shape, seed=5, dtype=lse.dtype)
        finite = lse.masked_fill(lse.isinf(), 0.0)
        used = [(out * weights[0]).sum(), (finite * weights[1]).sum()]
        losses.append(sum(used[{"out": 0, "lse": 1}.get(arrives, 0) :][: 2 if arrives == "both" else 1]))
    for loss in losses:
        loss.backward()
    for name, tensor in leaves.items():
        assert (tensor.grad is None) == (name not in wanted), name
        assert name not in wanted or same_bits(tensor.grad, every[name].grad), name
    assert arrives == "lse" or all(tensor.grad.any() for tensor in every.values())


@pytest.mark.parametrize("rank", range(5))
@pytest.mark.parametrize("size", [(5, 40), (40, 50), (110, 410)])
def test_broadcast_biases(isa, rank, size, dtype):
    """Every way to broadcast a bias over two batches, four heads, rows and keys; its gradient is the sum over them."""
    q_len, k_len = size
    query, key, value = qkv(q_len, k_len, dtype=dtype)
    full = (2, 4, q_len, k_len)[4 - rank :]
    for kept in range(2**rank):
        if isa == "scalar" and 0 < kept < 2**rank - 1 and rank == 4 and q_len > 40:
            continue  # the slowest kernels take the ends of this list
        shape = [n if kept >> i & 1 else 1 for i, n in enumerate(full)]
        bias = randn(*shape, seed=kept, dtype=dtype)
        in_bound(Problem(query=query, key=key, value=value, attn_mask=bias, is_causal=True), isa)


@pytest.mark.parametrize("rank", range(5))
@pytest.mark.parametrize("q_len", [3, 50])
def test_broadcast_gates(isa, rank, q_len, dtype):
    query, key, value = qkv(q_len, 50, dtype=dtype)
    ids = torch.randint(0, 3, (2, 50), generator=torch.Generator().manual_seed(6))
    full = (2, 4, q_len, 2)[4 - rank :]
    for kept in range(2**rank):
        shape = [n if kept >> i & 1 else 1 for i, n in enumerate(full)]
        gate = randn(*shape, seed=kept, dtype=dtype)
        arguments = Problem(query=query, key=key, value=value, modality=ids, merge="gate", gate=gate)
        in_bound({**arguments, "image_rows": "causal"}, isa)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_extras_of_another_dtype(isa, kind, dtype):
    """A bias or a gate may have a dtype of its own; its gradient has it too."""
    for feature, name in (("bias", "attn_mask"), ("block gate", "gate")):
        arguments = problem(feature, dtype)
        arguments[name] = arguments[name].to(kind)
        in_bound(arguments, isa)
        assert everything(arguments)[f"d_{name}"].dtype == kind


def test_a_gate_of_zero_has_the_gradient_that_opens_it(dtype):
    """Tanh gates start there: the term is absent, its gradient is not."""
    arguments = problem("block gate", dtype)
    arguments["gate"] = torch.zeros(2, dtype=dtype)
    results = everything(arguments)
    assert not results["out"].any() and results["d_gate"].all()


def test_one_tensor_in_several_places(dtype):
    """query, key and value may be the same leaf: its gradient is the sum."""
    x = randn(2, 4, 20, 8, dtype=dtype).requires_grad_()
    parts = [x.detach().clone().requires_grad_() for _ in range(3)]
    weights = randn(2, 4, 20, 8, seed=4, dtype=dtype)
    (functional.attention(x, x, x) * weights).sum().backward()
    (functional.attention(*parts) * weights).sum().backward()
    expected = sum(part.grad.double() for part in parts)
    bound = 2 * torch.finfo(dtype).eps * sum(part.grad.double().abs() for part in parts)
    assert ((x.grad.double() - expected).abs() <= bound).all()


def test_merge_and_map_subsets(dtype):
    """merge_attention gives gradients to outputs, lses or both."""
    outs, lses = randn(3, 5, 7, dtype=dtype), randn(3, 5, seed=1)
    for wanted in subsets(["outs", "lses"]):
        o, s = outs.clone().requires_grad_("outs" in wanted), lses.clone().requires_grad_("lses" in wanted)
        out, lse = functional.merge_attention(o, s)
        (out.double().sin().sum() + lse.sum()).backward()
        assert (o.grad is not None) == ("outs" in wanted) and (s.grad is not None) == ("lses" in wanted)
