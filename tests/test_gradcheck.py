"""Gradients in fp64 against finite differences: every path of the backward pass, lse included, at small sizes."""

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError, gradcheck

from mmca_ext import _C, functional

attention = torch.ops.mmca_ext.attention
mmca_attention = torch.ops.mmca_ext.mmca_attention
ISAS = sorted({kernel["isa"] for kernel in _C.kernels() if kernel["available"]})
RNG_STATE = torch.tensor([1234, 5])


def inputs(batch=2, heads=4, kv_heads=2, q_len=5, k_len=7, head_dim=3, value_dim=4, rows=False):
    generator = torch.Generator().manual_seed(0)
    shapes = (heads, q_len, head_dim), (kv_heads, k_len, head_dim), (kv_heads, k_len, value_dim)
    tensors = [torch.randn(batch, h, n, d, generator=generator, dtype=torch.float64) for h, n, d in shapes]
    if rows:
        tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    return [t.requires_grad_() for t in tensors]


def check(function, tensors):
    assert gradcheck(function, tensors, eps=1e-6, atol=1e-7, rtol=1e-6, nondet_tol=0.0)


def finite_lse(lse):
    """-inf of an empty row has no finite difference."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


@pytest.fixture(params=ISAS)
def isa(request):
    _C.force_isa(request.param)
    yield request.param
    _C.force_isa(None)


MASK = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(1)) < 0.6
MASK[0, 0, 2] = False
KEY_MASK = torch.tensor([[True] * 5 + [False] * 2, [False, True] * 3 + [True]])


@pytest.mark.parametrize(
    "shape, kwargs",
    [
        ({}, {}),
        ({"rows": True}, {"is_causal": True}),
        ({"q_len": 9, "k_len": 4}, {"is_causal": True}),
        ({"q_len": 11, "heads": 1, "kv_heads": 1, "k_len": 19, "batch": 1}, {"window": (3, 2)}),
        ({}, {"attn_mask": MASK, "scale": 1.7}),
        ({}, {"attn_mask": MASK, "key_mask": KEY_MASK, "is_causal": True, "window": (4, None)}),
        ({"head_dim": 1, "value_dim": 17}, {"key_mask": KEY_MASK, "scale": -0.4}),
    ],
    ids=str,
)
def test_attention(isa, shape, kwargs):
    def function(*tensors):
        out, lse = functional.attention(*tensors, return_lse=True, **kwargs)
        return out, finite_lse(lse)

    check(function, inputs(**shape))


@pytest.mark.parametrize("p", [0.3, 0.9])
def test_attention_with_dropout(isa, p):
    def function(query, key, value):
        return attention(query, key, value, MASK, None, RNG_STATE, None, True, -1, -1, p, False)[0]

    check(function, inputs())


MODALITY = torch.tensor([[2, 2, 1, 3, 3, 1, 1], [1, 2, 0, 2, 1, 2, 2]])
IMAGE_ID = torch.tensor([[1, 2, 0, 3, 3, 0, 0], [0, 5, 0, 5, 0, 6, 7]])


@pytest.mark.parametrize("image_rows", ["self", "block", "causal", "self+text"])
@pytest.mark.parametrize("merge", ["sum", "lse"])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_mmca_attention(isa, image_rows, merge, p):
    def function(query, key, value):
        arguments = (MODALITY, IMAGE_ID, RNG_STATE if p else None, image_rows, merge, None, p, True)
        out, lse, _, _ = mmca_attention(query, key, value, *arguments)
        return out, finite_lse(lse)

    check(function, inputs(q_len=6))


@pytest.mark.parametrize("merge", ["sum", "lse"])
@pytest.mark.parametrize("rows", [False, True])
def test_mmca_of_a_whole_sequence(isa, merge, rows):
    def function(*tensors):
        return functional.mmca_attention(*tensors, MODALITY, image_rows="block", merge=merge)

    check(function, inputs(q_len=7, rows=rows))


def test_gradcheck_can_fail():
    """A gradient for another dropout mask than the forward's is noticed."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, key, value):
            ctx.save_for_backward(query, key, value)
            return attention(query, key, value, None, None, RNG_STATE, None, False, -1, -1, 0.5, False)[0]

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                tensors = [t.detach().requires_grad_() for t in ctx.saved_tensors]
                out = attention(*tensors, None, None, RNG_STATE + 1, None, False, -1, -1, 0.5, False)[0]
            return torch.autograd.grad(out, tensors, grad)

    with pytest.raises(GradcheckError):
        check(Wrong.apply, inputs())
