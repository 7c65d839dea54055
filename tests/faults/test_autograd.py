"""Saved tensors changed in place, double backward, vmap, jvp: right, or an error that says what is the matter."""

import warnings

import pytest
import torch

from mmca_ext import functional, reference

from .common import FEATURES, Problem, call, problem, qkv, same_bits

VICTIMS = [
    ("bias", ["query", "key", "value", "attn_mask", "out", "lse"]),
    ("masks", ["attn_mask", "key_mask"]),
    ("block gate", ["query", "key", "value", "gate", "modality", "image_id", "out", "lse"]),
    ("packed", ["query", "cu_seqlens_q", "cu_seqlens_k"]),
    ("packed mmca", ["modality", "cu_seqlens"]),
]


@pytest.mark.parametrize("feature, which", [(feature, name) for feature, names in VICTIMS for name in names])
def test_modified_saved_tensors_are_noticed(feature, which, dtype):
    arguments = problem(feature, dtype, 5, 9)
    if which == "image_id":
        arguments["image_id"] = arguments["modality"].clone()
    for name in arguments.differentiable():
        arguments[name] = arguments[name].requires_grad_().clone()
    out, lse = call(arguments)
    loss = out.sum()
    with torch.no_grad():
        {**arguments, "out": out, "lse": lse}[which].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("feature", FEATURES)
def test_double_backward_is_right(feature):
    """The gradient of a gradient penalty, by the operators and by the reference, in float64."""
    arguments = problem(feature, torch.float64, 6, 9)
    results = []
    for module in (functional, reference):
        leaves = {name: arguments[name].detach().requires_grad_() for name in arguments.differentiable()}
        function = module.mmca_attention if "modality" in arguments else module.attention
        kwargs = {**arguments, **leaves, "return_lse": True}
        if "dropout_p" in arguments:
            kwargs["generator"] = torch.Generator().manual_seed(9)
        out, lse = function(**kwargs)
        loss = out.sin().sum() + lse.masked_fill(lse.isinf(), 0.0).cos().sum()
        first = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        results.append([*first, *torch.autograd.grad(penalty, list(leaves.values()))])
    for actual, expected in zip(*results, strict=True):
        # Sums of some hundred terms of size one, differentiated twice.
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("feature", ["bias", "block gate"])
def test_double_backward_in_every_dtype(feature, dtype):
    """Close to float64's, as far as the first gradients' storage allows."""
    results = []
    for kind in (dtype, torch.float64):
        arguments = problem(feature, dtype, 6, 9)
        leaves = {name: arguments[name].to(kind).requires_grad_() for name in arguments.differentiable()}
        out, _ = call({**arguments, **leaves})
        first = torch.autograd.grad(out.sin().sum(), list(leaves.values()), create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), list(leaves.values())))
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == dtype and actual.isfinite().all()
        size = expected.abs().max().item()
        assert (actual.double() - expected).abs().max() <= 64 * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("call", ["attention", "mmca_attention"])
@pytest.mark.parametrize("leaf", [True, False])
def test_forward_mode_is_right_or_a_named_error(call, leaf):
    query, key, value = qkv(6, 9)
    extra = () if call == "attention" else (torch.ones(2, 9, dtype=torch.int64),)
    tangent = torch.ones_like(query)
    _, expected = torch.func.jvp(lambda q: getattr(reference, call)(q, key, value, *extra), (query,), (tangent,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(query.clone().requires_grad_(leaf), tangent)
        try:
            out = getattr(functional, call)(dual, key, value, *extra)
        except (NotImplementedError, RuntimeError) as error:
            assert "jvp" in str(error) or "forward" in str(error)
            return
        actual = torch.autograd.forward_ad.unpack_dual(out).tangent
    assert actual is not None, "the tangent was lost in silence"
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", ["attn_mask", "gate"])
def test_forward_mode_of_bias_and_gate_is_right_or_a_named_error(name):
    arguments = problem("bias" if name == "attn_mask" else "block gate", torch.float64, 6, 9)
    with torch.autograd.forward_ad.dual_level():
        tangent = torch.ones_like(arguments[name])
        arguments[name] = torch.autograd.forward_ad.make_dual(arguments[name], tangent)
        try:
            out, _ = call(arguments)
        except (NotImplementedError, RuntimeError) as error:
            assert "jvp" in str(error) or "forward" in str(error)
            return
        assert torch.autograd.forward_ad.unpack_dual(out).tangent is not None, "the tangent was lost in silence"


@pytest.mark.parametrize("feature", ["causal", "bias", "self sum", "packed"])
def test_vmap_of_the_forward(feature, dtype):
    arguments = problem(feature, dtype, 6, 9)
    query = arguments["query"]
    queries = torch.stack((query, -query, 2 * query))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's note that it loops over the batch
        out = torch.vmap(lambda q: call({**arguments, "query": q})[0])(queries)
    assert same_bits(out, torch.stack([call({**arguments, "query": q})[0] for q in queries]))


def test_functional_gradients_are_right_or_a_named_error():
    query, key, value = qkv(6, 9)
    try:
        actual = torch.func.grad(lambda q: functional.attention(q, key, value).sin().sum())(query)
    except NotImplementedError as error:
        assert str(error).startswith("mmca_ext: torch.func")
        return
    leaf = query.clone().requires_grad_()
    functional.attention(leaf, key, value).sin().sum().backward()
    torch.testing.assert_close(actual, leaf.grad)


def test_results_may_be_changed_in_place_where_nothing_is_saved():
    query, key, value = qkv(6, 9)
    out = functional.attention(query, key, value)
    expected = out + 1
    assert torch.equal(out.add_(1), expected)


def test_the_same_graph_backward_twice(dtype):
    arguments = problem("bias", dtype, 20, 30)
    leaves = {name: arguments[name].requires_grad_() for name in arguments.differentiable()}
    out, _ = call(Problem(arguments))
    loss = out.sum()
    first = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    second = torch.autograd.grad(loss, list(leaves.values()))
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, list(leaves.values()))


def test_forward_over_reverse_is_right_or_a_named_error():
    """A tangent that arrives at the backward alone."""
    query, key, value = (t.requires_grad_() for t in qkv(6, 9))
    out = functional.attention(query, key, value)
    with torch.autograd.forward_ad.dual_level():
        grad = torch.autograd.forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        try:
            (gradient,) = torch.autograd.grad(out, query, grad)
        except (NotImplementedError, RuntimeError) as error:
            assert "jvp" in str(error) or "forward" in str(error)
            return
        assert torch.autograd.forward_ad.unpack_dual(gradient).tangent is not None, "the tangent was lost in silence"
