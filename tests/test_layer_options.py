"""Options of the layers that reach into the operators: bias, softcap, window, and the gate of the image term."""

import math

import pytest
import torch
import torch.nn.functional as F
from layers import assert_same, heads_of, make, plain_attention, randn

from mmca_ext import MGQA, MultiModalCausalAttention
from mmca_ext.nn._heads import merge_heads

X = randn(4, 5, 24)
MODALITY = torch.tensor([[1, 2, 2, 1, 0], [2, 2, 1, 3, 1], [1, 1, 1, 1, 1], [0, 0, 2, 2, 1]])

both = pytest.mark.parametrize("flash", [False, True])


def projections(layer, x=X):
    """query, key, value with the key/value heads repeated."""
    groups = layer.heads // layer.kv_heads
    query, key, value = (
        heads_of(p(x), h)
        for p, h in ((layer.to_q, layer.heads), (layer.to_k, layer.kv_heads), (layer.to_v, layer.kv_heads))
    )
    return query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)


# ---------------------------------------------------------------- MGQA


@both
def test_bias(flash):
    layer = make(MGQA, 24, 4, 2, 8, flash=flash)
    bias = randn(1, 4, 5, 5, seed=4).requires_grad_()
    mask = torch.ones(5, 5).tril().bool()
    out = F.scaled_dot_product_attention(*projections(layer), bias.masked_fill(~mask, -math.inf))
    expected = layer.to_out(merge_heads(out))
    actual = layer(X, attn_mask=mask, bias=bias)
    assert_same(actual, expected)
    (gradient,) = torch.autograd.grad(actual.square().sum(), bias)
    assert_same(gradient, torch.autograd.grad(expected.square().sum(), bias)[0])
    assert gradient.abs().sum() > 0


@both
@pytest.mark.parametrize("shape", [(5, 5), (1, 5), (4, 5, 5), (1, 4, 1, 5), (4, 4, 5, 5)])
def test_bias_is_read_by_rank(flash, shape):
    layer, bias = make(MGQA, 24, 4, 2, 8, flash=flash), randn(*shape, seed=4)
    full = bias[:, None] if bias.dim() == 3 else bias
    out = F.scaled_dot_product_attention(*projections(layer), full.expand(4, 4, 5, 5))
    assert_same(layer(X, bias=bias), layer.to_out(merge_heads(out)))
    with pytest.raises(ValueError, match="bias must have shape"):
        layer(X, bias=bias[..., :4])


@both
def test_softcap(flash):
    layer = make(MGQA, 24, 4, 2, 8, causal=True, flash=flash, softcap=0.2)
    query, key, value = projections(layer)
    scores = 0.2 * torch.tanh(query @ key.mT / math.sqrt(8) / 0.2)
    weights = scores.masked_fill(~torch.ones(5, 5).tril().bool(), -math.inf).softmax(-1)
    assert_same(layer(X), layer.to_out(merge_heads(weights @ value)))


@both
def test_window(flash):
    layer = make(MGQA, 24, 4, 2, 8, flash=flash, window=(1, 2))
    distance = torch.arange(5) - torch.arange(5)[:, None]
    mask = (distance >= -1) & (distance <= 2)
    assert_same(layer(X), layer.to_out(merge_heads(plain_attention(*projections(layer), mask))))


# ---------------------------------------------------------------- merge="gate"


def gated(image_rows="self", gate=None, **kwargs):
    layer = make(MultiModalCausalAttention, 24, 4, 2, 8, image_rows=image_rows, merge="gate", **kwargs)
    if gate is not None:
        layer.image_gate.data.copy_(gate)
    return layer


def test_gate_is_a_parameter_per_head_that_starts_at_zero():
    layer = gated()
    assert sorted(layer.state_dict()) == ["image_gate", "to_out.weight", "to_qkv.weight"]
    assert layer.image_gate.shape == (4,) and (layer.image_gate == 0).all()


@both
@pytest.mark.parametrize("image_rows", ["self", "block", "causal", "self+text"])
def test_gate_at_zero_leaves_text_to_the_text_and_image_rows_as_they_are(flash, image_rows):
    layer = gated(image_rows, flash=flash)
    out = layer(X, MODALITY)
    text = MODALITY == 1
    only_text = layer(X, torch.where(text, MODALITY, 0))
    assert_same(out[text], only_text[text])
    summed = make(MultiModalCausalAttention, 24, 4, 2, 8, image_rows=image_rows)  # the same weights
    assert_same(out[MODALITY >= 2], summed(X, MODALITY)[MODALITY >= 2])
    assert (out[MODALITY == 0] == 0).all()


@both
def test_gate_weighs_the_image_term_of_text_rows_per_head(flash):
    gate = torch.tensor([0.3, -1.0, 0.0, 2.0], dtype=torch.float64)
    layer = gated("block", gate, flash=flash)
    query, key, value = (heads_of(t, h) for t, h in zip(layer.to_qkv(X).split((32, 16, 16), -1), (4, 2, 2)))
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    causal, is_text = torch.ones(5, 5).tril().bool(), MODALITY == 1
    text, image = (plain_attention(query, key, value, causal & m[:, None, None]) for m in (is_text, MODALITY >= 2))
    expected = layer.to_out(merge_heads(text + gate.tanh()[:, None, None] * image))
    assert_same(layer(X, MODALITY)[is_text], expected[is_text])


@both
def test_gate_opens_by_its_gradient(flash):
    layer = gated(flash=flash)
    layer(X, MODALITY).square().sum().backward()
    assert (layer.image_gate.grad != 0).all()


@both
def test_softcap_of_the_modalities(flash):
    """Capped near 0 all scores are, so each softmax averages."""
    layer = make(MultiModalCausalAttention, 24, 4, 4, 8, flash=flash, softcap=1e-30)
    value = heads_of(layer.to_qkv(X)[..., 64:], 4)
    row, expected = (0, 3), value[0, :, [0, 3]].mean(1) + value[0, :, [1, 2]].mean(1)
    assert_same(layer(X, MODALITY)[row], layer.to_out(expected.flatten()))
