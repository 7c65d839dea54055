"""Packed batches in the layers: each sequence has the rows it has in a padded batch and alone."""

import importlib

import pytest
import torch
from layers import assert_same, make, randn

from mmca_ext import (
    MGQA,
    KVCache,
    MultiModalCausalAttention,
    MultiModalCrossAttention,
    RotaryEmbedding,
    SimpleMMCA,
    reference,
)

LENGTHS, CONTEXT_LENGTHS = [4, 0, 1, 7], [3, 2, 6, 1]
X, CONTEXT = randn(12, 24), randn(12, 16, seed=1)
VISUAL = randn(12, 24, seed=2)
MODALITY = torch.tensor([1, 2, 2, 1, 2, 2, 2, 1, 3, 3, 1, 0])

both = pytest.mark.parametrize("flash", [False, True])
offset_types = pytest.mark.parametrize("dtype", [torch.int32, torch.int64])


def offsets(lengths, dtype=torch.int32):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=dtype)


CU, CONTEXT_CU = offsets(LENGTHS), offsets(CONTEXT_LENGTHS)


def padded(packed, lengths):
    """(S, longest, ...) with zeros behind each sequence, and the mask of what is not padding."""
    rows = torch.nn.utils.rnn.pad_sequence(packed.split(lengths), batch_first=True)
    return rows, torch.arange(rows.shape[1]) < torch.tensor(lengths)[:, None]


@pytest.fixture
def cross_attention(flash, monkeypatch):
    """A maker of MultiModalCrossAttention, whose documented signature has no flash."""
    if not flash:
        module = importlib.import_module("mmca_ext.nn.cross_attention")
        monkeypatch.setattr(module, "functional", reference)
    return lambda **kwargs: make(MultiModalCrossAttention, 24, 4, 16, 8, **kwargs)


@both
@offset_types
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"causal": True, "rotary": RotaryEmbedding(8)}, {"qk_norm": True}]
)
def test_mgqa(flash, dtype, options):
    layer = make(MGQA, 24, 4, 2, 8, flash=flash, **options)
    rows, real = padded(X, LENGTHS)
    expected = layer(rows, mask=real)[real]
    cu_seqlens = offsets(LENGTHS, dtype)
    assert_same(layer(X, cu_seqlens=cu_seqlens), expected)
    assert_same(layer(X, cu_seqlens=cu_seqlens, max_seqlen=7), expected)


@both
@offset_types
def test_mgqa_with_a_context(flash, dtype):
    layer = make(MGQA, 24, 4, 2, 8, context_dim=16, flash=flash)
    (rows, real), (context, context_mask) = padded(X, LENGTHS), padded(CONTEXT, CONTEXT_LENGTHS)
    expected = layer(rows, context, context_mask=context_mask)[real]
    given = {"cu_seqlens": offsets(LENGTHS, dtype), "context_cu_seqlens": offsets(CONTEXT_LENGTHS, dtype)}
    assert_same(layer(X, CONTEXT, **given), expected)
    assert_same(layer(X, CONTEXT, **given, max_seqlen=8, context_max_seqlen=6), expected)


@both
@pytest.mark.parametrize("options", [{}, {"qk": True, "post_attn_norm": True}, {"attention_strategy": "average"}])
def test_multimodal_cross_attention(cross_attention, options):
    layer = cross_attention(**options)
    (rows, real), (context, context_mask) = padded(X, LENGTHS), padded(CONTEXT, CONTEXT_LENGTHS)
    expected = layer(rows, context, context_mask=context_mask)[real]
    assert_same(layer(X, CONTEXT, cu_seqlens=CU, context_cu_seqlens=CONTEXT_CU), expected)
    assert_same(
        layer(X, CONTEXT, cu_seqlens=CU, context_cu_seqlens=CONTEXT_CU, max_seqlen=7, context_max_seqlen=6), expected
    )


@both
@offset_types
@pytest.mark.parametrize("image_rows", ["self", "block", "causal", "self+text"])
@pytest.mark.parametrize("merge", ["sum", "lse", "gate"])
def test_multimodal_causal_attention(flash, dtype, image_rows, merge):
    layer = make(
        MultiModalCausalAttention,
        24,
        4,
        2,
        8,
        image_rows=image_rows,
        merge=merge,
        flash=flash,
        rotary=RotaryEmbedding(8),
    )
    if merge == "gate":
        layer.image_gate.data.copy_(randn(4))
    (rows, real), (modality, _), (image_id, _) = (padded(t, LENGTHS) for t in (X, MODALITY, MODALITY * 7))
    cu_seqlens = offsets(LENGTHS, dtype)
    assert_same(layer(X, MODALITY, cu_seqlens=cu_seqlens, max_seqlen=7), layer(rows, modality)[real])
    expected = layer(rows, modality, image_id)[real]
    assert_same(layer(X, MODALITY, MODALITY * 7, cu_seqlens=cu_seqlens), expected)


@both
def test_simple_mmca(flash):
    layer = make(SimpleMMCA, 24, 4, dim_head=8, flash=flash)
    (v, visual_mask), (t, text_mask) = padded(VISUAL, CONTEXT_LENGTHS), padded(X, LENGTHS)
    expected = layer(v, t, visual_mask, text_mask)
    out = layer(VISUAL, X, visual_cu_seqlens=CONTEXT_CU, text_cu_seqlens=CU)
    assert_same(out.visual, expected.visual[visual_mask])
    assert_same(out.text, expected.text[text_mask])
    bounds = {"visual_max_seqlen": 6, "text_max_seqlen": 7}
    assert_same(layer(VISUAL, X, visual_cu_seqlens=CONTEXT_CU, text_cu_seqlens=CU, **bounds).text, out.text)


@both
def test_tokens_behind_the_last_offset_are_zero_and_gradients_arrive(flash):
    layer = make(MGQA, 24, 4, 2, 8, causal=True, flash=flash, rotary=RotaryEmbedding(8))
    out = layer(X, cu_seqlens=CU[:-1])
    assert (out[5:] == 0).all() and (out[:5] != 0).any()
    out.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())


PACKED = {"cu_seqlens": CU}
BOTH_PACKED = {"cu_seqlens": CU, "context_cu_seqlens": CONTEXT_CU}


def cached(layer):
    return KVCache.for_layer(layer, 1, 20)


def mgqa():
    return make(MGQA, 24, 4, 2, 8)


def contextual():
    return make(MGQA, 24, 4, 2, 8, context_dim=16)


def cross(**kwargs):
    return make(MultiModalCrossAttention, 24, 4, 16, 8, **kwargs)


def mmca():
    return make(MultiModalCausalAttention, 24, 4, 2, 8)


@pytest.mark.parametrize(
    "error, says, call",
    [
        (ValueError, r"x must have shape \(T, 24\)", lambda: mgqa()(X[None], **PACKED)),
        (ValueError, r"x must have shape \(B, N, 24\)", lambda: mgqa()(X)),
        (TypeError, "cu_seqlens.*list", lambda: mgqa()(X, cu_seqlens=[0, 12])),
        (ValueError, "cu_seqlens.*float32", lambda: mgqa()(X, cu_seqlens=CU.float())),
        (ValueError, r"cu_seqlens.*\(S \+ 1,\)", lambda: mgqa()(X, cu_seqlens=CU[None])),
        (ValueError, "^mask does not go with cu_seqlens", lambda: mgqa()(X, mask=torch.ones(12).bool(), **PACKED)),
        (ValueError, "attn_mask does not go", lambda: mgqa()(X, attn_mask=torch.ones(12, 12).bool(), **PACKED)),
        (ValueError, "bias does not go", lambda: mgqa()(X, bias=torch.ones(12, 12), **PACKED)),
        (ValueError, "cache does not go", lambda: mgqa()(X, cache=cached(mgqa()), **PACKED)),
        (ValueError, "max_seqlen belongs to cu_seqlens", lambda: mgqa()(X[None], max_seqlen=12)),
        (ValueError, "context_cu_seqlens belongs to a context", lambda: mgqa()(X, **BOTH_PACKED)),
        (ValueError, "context_max_seqlen belongs to a context", lambda: mgqa()(X, context_max_seqlen=2, **PACKED)),
        (
            ValueError,
            "context_cu_seqlens belongs to cu_seqlens",
            lambda: contextual()(X[None], CONTEXT[None], context_cu_seqlens=CU),
        ),
        (ValueError, "needs context_cu_seqlens", lambda: contextual()(X, CONTEXT, **PACKED)),
        (
            ValueError,
            "context_cu_seqlens.*got 3 and 4",
            lambda: contextual()(X, CONTEXT, cu_seqlens=CU, context_cu_seqlens=CONTEXT_CU[:-1]),
        ),
        (ValueError, r"context must have shape \(T, 16\)", lambda: contextual()(X, CONTEXT[None], **BOTH_PACKED)),
        (
            ValueError,
            "context_mask does not go",
            lambda: cross()(X, CONTEXT, context_mask=torch.ones(12).bool(), **BOTH_PACKED),
        ),
        (
            ValueError,
            r"mask \(at construction\)",
            lambda: cross(mask=torch.ones(12, 12).bool())(X, CONTEXT, **BOTH_PACKED),
        ),
        (ValueError, "needs context_cu_seqlens", lambda: cross()(X, CONTEXT, **PACKED)),
        (TypeError, "context must be a tensor", lambda: cross()(X[None])),
        (ValueError, r"modality must have shape \(12,\)", lambda: mmca()(X, MODALITY[None], **PACKED)),
        (ValueError, "cache does not go", lambda: mmca()(X, MODALITY, cache=cached(mmca()), **PACKED)),
        (ValueError, "max_seqlen belongs to cu_seqlens", lambda: mmca()(X[None], MODALITY[None], max_seqlen=3)),
        (
            ValueError,
            "visual_cu_seqlens and text_cu_seqlens",
            lambda: make(SimpleMMCA, 24, 4)(X, X, text_cu_seqlens=CU),
        ),
        (
            ValueError,
            r"v must have shape \(T, 24\)",
            lambda: make(SimpleMMCA, 24, 4)(X[None], X, visual_cu_seqlens=CU, text_cu_seqlens=CU),
        ),
        (
            ValueError,
            "mask does not go",
            lambda: make(SimpleMMCA, 24, 4)(X, X, torch.ones(12).bool(), visual_cu_seqlens=CU, text_cu_seqlens=CU),
        ),
    ],
)
def test_errors_name_the_argument(error, says, call):
    with pytest.raises(error, match=says):
        call()


@both
@pytest.mark.parametrize("bad", [[0, 13], [0, 5, 3, 12], [1, 12], [-1, 12]])
def test_offsets_that_cannot_be_are_errors_of_the_operators(flash, bad):
    layer = make(MGQA, 24, 4, 2, 8, flash=flash, rotary=RotaryEmbedding(8))
    with pytest.raises(ValueError, match="cu_seqlens"):
        layer(X, cu_seqlens=torch.tensor(bad))
