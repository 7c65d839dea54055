"""Generation with a cache gives the rows of one call on the whole sequence, in chunks of any size."""

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
from mmca_ext.nn import rotary_positions

BATCH, LENGTH = 3, 12
X, CONTEXT = randn(BATCH, LENGTH, 24), randn(BATCH, 7, 16, seed=1)
CHUNKS = [[5, *[1] * 7], [1] * 12, [4, 3, 5], [12], [0, 2, 0, 10]]

both = pytest.mark.parametrize("flash", [False, True])
chunked = pytest.mark.parametrize("chunks", CHUNKS, ids=str)


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def step_by_step(layer, chunks, *inputs, cache=None, **kwargs):
    """The rows of calls on consecutive chunks of inputs (B, N, ...) and of keyword tensors (..., N)."""
    cache = KVCache.for_layer(layer, len(inputs[0]), sum(chunks)) if cache is None else cache
    rows, begin = [], 0
    for count in chunks:
        part = slice(begin, begin + count)
        given = {name: value[..., part] for name, value in kwargs.items()}
        rows.append(layer(*(t[:, part] for t in inputs), **given, cache=cache))
        begin += count
    return torch.cat(rows, 1)


# ---------------------------------------------------------------- MGQA

OPTIONS = {
    "plain": {},
    "multi-query": {"kv_heads": 1},
    "qk_norm": {"qk_norm": True},
    "window": {"window": (3, 0)},
    "softcap": {"softcap": 0.3},
    "rotary": {"rotary": RotaryEmbedding(8)},
    "rotary qk_norm": {"rotary": RotaryEmbedding(8, pairs="interleaved"), "qk_norm": True},
}


def mgqa(kv_heads=2, **kwargs):
    return make(MGQA, 24, 4, kv_heads, 8, causal=True, **kwargs)


@both
@chunked
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_mgqa_step_by_step_is_the_whole(flash, chunks, options):
    layer = mgqa(flash=flash, **options)
    assert_same(step_by_step(layer, chunks, X), layer(X))


@both
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_left_padded_prompts_of_unequal_length(flash, options):
    """Each sequence gets the rows it has alone: padding is no key, and rotary positions are relative."""
    layer, padding = mgqa(flash=flash, **options), [0, 2, 4]
    mask = torch.arange(LENGTH) >= torch.tensor(padding)[:, None]
    out = step_by_step(layer, [6, 1, 1, 4], X, mask=mask)
    assert_same(out, layer(X, mask=mask))
    for b, left in enumerate(padding):
        assert_same(out[b : b + 1, left:], layer(X[b : b + 1, left:]))
    # Only the prompt has padding, so later calls need no mask.
    cache = KVCache.for_layer(layer, BATCH, LENGTH)
    first = layer(X[:, :6], mask=mask[:, :6], cache=cache)
    assert_same(torch.cat([first, step_by_step(layer, [6], X[:, 6:], cache=cache)], 1), out)


@both
def test_masks_cover_all_cached_keys(flash):
    layer, mask = mgqa(flash=flash), randn(BATCH, LENGTH, LENGTH, seed=4) > 0
    expected, cache = layer(X, attn_mask=mask), KVCache.for_layer(layer, BATCH, LENGTH)
    layer(X[:, :8], cache=cache)
    with pytest.raises(ValueError, match=r"attn_mask must have shape.*M=12"):
        layer(X[:, 8:], attn_mask=mask[:, 8:, 8:], cache=cache)
    assert cache.length == 8  # what is refused is not appended
    assert_same(layer(X[:, 8:], attn_mask=mask[:, 8:], cache=cache), expected[:, 8:])


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_less_accurate_than_the_whole(flash, dtype):
    layer = mgqa(flash=flash, rotary=RotaryEmbedding(8))
    exact = layer(X)
    layer = layer.to(dtype)
    error = [
        (out.double() - exact).abs().max()
        for out in (step_by_step(layer, [5, 1, 1, 5], X.to(dtype)), layer(X.to(dtype)))
    ]
    assert error[0] <= 2 * error[1] + torch.finfo(dtype).eps * exact.abs().max()


@both
def test_rolling_back_and_going_on(flash):
    """Speculative decoding: what was proposed in vain leaves no trace."""
    layer = mgqa(flash=flash, rotary=RotaryEmbedding(8))
    cache = KVCache.for_layer(layer, BATCH, LENGTH)
    first = layer(X[:, :6], cache=cache)
    layer(randn(BATCH, 4, 24, seed=9), cache=cache)
    cache.truncate(6)
    assert_same(torch.cat([first, layer(X[:, 6:], cache=cache)], 1), layer(X))
    cache.reset()
    assert_same(step_by_step(layer, [3, 9], X, cache=cache), layer(X))


@both
def test_beams_change_places(flash):
    layer, index = mgqa(flash=flash), torch.tensor([2, 2, 0])
    mask = torch.arange(LENGTH) >= torch.tensor([0, 2, 4])[:, None]
    cache = KVCache.for_layer(layer, BATCH, LENGTH)
    layer(X[:, :6], mask=mask[:, :6], cache=cache)
    cache.reorder(index)
    beams = torch.cat([X[index, :6], X[:, 6:]], 1)
    assert_same(layer(X[:, 6:], cache=cache), layer(beams, mask=mask[index])[:, 6:])


# ---------------------------------------------------------------- MultiModalCausalAttention

#                          prompt with an image        | image in mid-conversation | and text
MODALITY = torch.tensor([[1, 2, 2, 2, 1, 1, 1, 2, 2, 2, 1, 1], [0, 0, 1, 2, 1, 1, 3, 3, 3, 3, 1, 1], [1] * 12])
IMAGE_CHUNKS = [[6, 5, 1], [5, 1, 5, 1], [12], [6, 6]]  # no image is cut


def mmca(image_rows, merge, **kwargs):
    layer = make(MultiModalCausalAttention, 24, 4, 2, 8, image_rows=image_rows, merge=merge, **kwargs)
    if merge == "gate":
        layer.image_gate.copy_(randn(4))
    return layer


@both
@pytest.mark.parametrize("image_rows", ["self", "block", "causal", "self+text"])
@pytest.mark.parametrize("merge", ["sum", "lse", "gate"])
@pytest.mark.parametrize("rotary", [None, RotaryEmbedding(8)], ids=["", "rotary"])
def test_multimodal_causal_attention_step_by_step_is_the_whole(flash, image_rows, merge, rotary):
    layer = mmca(image_rows, merge, flash=flash, rotary=rotary)
    expected = layer(X, MODALITY)
    assert_same(expected[1:2, 2:], layer(X[1:2, 2:], MODALITY[1:2, 2:]))  # without its padding
    for chunks in IMAGE_CHUNKS if image_rows == "block" else IMAGE_CHUNKS + CHUNKS:
        assert_same(step_by_step(layer, chunks, X, MODALITY), expected)


@both
@pytest.mark.parametrize("options", [{"qk_norm": True}, {"softcap": 0.3}], ids=str)
def test_multimodal_options_step_by_step(flash, options):
    layer = mmca("block", "sum", flash=flash, **options)
    assert_same(step_by_step(layer, [6, 5, 1], X, MODALITY), layer(X, MODALITY))


@both
def test_images_told_apart_by_image_id(flash):
    """Two images of one modality next to each other, appended one by one."""
    layer = mmca("block", "sum", flash=flash)
    modality = torch.tensor([[1, 2, 2, 2, 2, 2, 1]] * BATCH)
    image_id = torch.tensor([[0, 5, 5, 9, 9, 9, 0]] * BATCH)
    expected = layer(X[:, :7], modality, image_id)
    for chunks in ([3, 3, 1], [7], [1, 2, 3, 1]):
        assert_same(step_by_step(layer, chunks, X[:, :7], modality, image_id), expected)
    assert not torch.allclose(expected, layer(X[:, :7], modality))
    with pytest.raises(ValueError, match="goes on with the image"):
        step_by_step(layer, [3, 3, 1], X[:, :7], modality)


def test_an_image_cut_in_two_is_an_error_under_block_alone():
    for image_rows in ("self", "block", "causal", "self+text"):
        layer = mmca(image_rows, "sum")
        cache = KVCache.for_layer(layer, BATCH, LENGTH)
        layer(X[:, :8], MODALITY[:, :8], cache=cache)
        if image_rows == "block":
            with pytest.raises(ValueError, match=r"sequence 0.*image_rows=\"block\".*in one call"):
                layer(X[:, 8:], MODALITY[:, 8:], cache=cache)
            assert cache.length == 8
            layer(X[:1, 8:].expand(3, -1, -1), torch.ones(3, 4, dtype=torch.int64), cache=cache)  # text may follow
        else:
            layer(X[:, 8:], MODALITY[:, 8:], cache=cache)


@both
def test_generation_with_positions_of_images(flash):
    """M-RoPE: the positions of the prompt come from its images, those of each next token from the ones before."""
    rotary = RotaryEmbedding(8, sections=(2, 1, 1), axes="interleaved")
    layer = mmca("block", "lse", flash=flash, rotary=rotary)
    modality = torch.tensor([[0, 1, 2, 2, 2, 2, 1, 1, 1, 1], [1, 1, 1, 2, 2, 1, 1, 1, 1, 1]])
    grids = [(1, 2, 2), (1, 1, 2)]
    positions = rotary_positions(modality, grids)
    expected = layer(X[:2, :10], modality, positions=positions)
    assert_same(step_by_step(layer, [7, 1, 1, 1], X[:2, :10], modality, positions=positions), expected)
    prompt = rotary_positions(modality[:, :7], grids)
    following = prompt.amax((0, 2), keepdim=True) + 1  # (1, B, 1), for all axes
    cache = KVCache.for_layer(layer, 2, 10)
    rows = [layer(X[:2, :7], modality[:, :7], positions=prompt, cache=cache)]
    rows += [layer(X[:2, [7 + n]], modality[:, [7 + n]], positions=following + n, cache=cache) for n in range(3)]
    assert_same(torch.cat(rows, 1), expected)


@both
def test_given_positions_must_go_on_being_given(flash):
    layer = mgqa(flash=flash, rotary=RotaryEmbedding(8))
    positions = torch.arange(LENGTH) * 3
    expected, cache = layer(X, positions=positions), KVCache.for_layer(layer, BATCH, LENGTH)
    layer(X[:, :8], positions=positions[:8], cache=cache)
    with pytest.raises(ValueError, match="positions must be given"):
        layer(X[:, 8:], cache=cache)
    assert_same(layer(X[:, 8:], positions=positions[8:], cache=cache), expected[:, 8:])
    cache.reset()
    layer(X[:, :8], cache=cache)
    layer(X[:, 8:], cache=cache)


# ---------------------------------------------------------------- a context, encoded once


@both
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"softcap": 0.3}], ids=str)
def test_mgqa_attends_to_a_cached_context(flash, options):
    layer = make(MGQA, 24, 4, 2, 8, context_dim=16, flash=flash, **options)
    context_mask = randn(BATCH, 7, seed=2) > 0
    cache = layer.cache_context(CONTEXT)
    assert cache.frozen and cache.length == cache.capacity == 7
    for part in (slice(0, 5), slice(5, 6)):
        assert_same(layer(X[:, part], cache=cache), layer(X[:, part], CONTEXT))
    assert cache.length == 7
    cache, attn_mask = layer.cache_context(CONTEXT, context_mask), randn(5, 7, seed=3) > 0
    expected = layer(X[:, :5], CONTEXT, context_mask=context_mask, attn_mask=attn_mask)
    assert_same(layer(X[:, :5], cache=cache, attn_mask=attn_mask), expected)


@both
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qk": True},
        {"attention_strategy": "average", "post_attn_norm": True},
        {"mask": torch.ones(12, 7).tril().bool()},
    ],
    ids=["", "qk", "average", "mask"],
)
def test_multimodal_cross_attention_attends_to_a_cached_context(flash, options, monkeypatch):
    if not flash:
        monkeypatch.setattr(importlib.import_module("mmca_ext.nn.cross_attention"), "functional", reference)
    layer, context_mask = make(MultiModalCrossAttention, 24, 4, 16, 8, **options), randn(BATCH, 7, seed=2) > 0
    assert_same(layer(X, cache=layer.cache_context(CONTEXT)), layer(X, CONTEXT))
    expected = layer(X, CONTEXT, context_mask=context_mask)
    assert_same(layer(X, cache=layer.cache_context(CONTEXT, context_mask.int())), expected)


@both
@chunked
@pytest.mark.parametrize("masked", [False, True])
def test_simple_mmca_decodes(flash, chunks, masked):
    layer, v = make(SimpleMMCA, 24, 4, dim_head=8, flash=flash), randn(BATCH, 7, 24, seed=1)
    visual_mask = randn(BATCH, 7, seed=2) > 0 if masked else None
    text_mask = torch.arange(LENGTH) >= torch.tensor([[0], [2], [4]]) if masked else None
    cache, rows, begin = layer.make_cache(v, LENGTH, visual_mask), [], 0
    for count in chunks:
        part = slice(begin, begin + count)
        rows.append(layer.decode(X[:, part], cache, None if text_mask is None else text_mask[:, part]))
        begin += count
    assert_same(torch.cat(rows, 1), layer(v, X, visual_mask, text_mask).text)


# ---------------------------------------------------------------- compiled, and under autocast


@both
def test_a_compiled_layer_generates_without_compiling_every_step_anew(flash):
    """12 steps, and fullgraph=True raises an error at the ninth graph."""
    torch.compiler.reset()
    for layer, inputs in (
        (mgqa(flash=flash, rotary=RotaryEmbedding(8)), [X]),
        (mmca("causal", "sum", flash=flash), [X, MODALITY]),
    ):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert_same(step_by_step(compiled, [1] * 12, *inputs), layer(*inputs))


@both
def test_autocast_keeps_keys_as_its_projections_give_them(flash):
    layer, x = mgqa(flash=flash, qk_norm=True, rotary=RotaryEmbedding(8)).float(), X.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(TypeError, match=r"key must have the cache's dtype torch.float32, got torch.bfloat16"):
            layer(x, cache=KVCache.for_layer(layer, BATCH, LENGTH))
        cache = KVCache.for_layer(layer, BATCH, LENGTH, dtype=torch.bfloat16)
        out = step_by_step(layer, [5, 1, 6], x, cache=cache)
    torch.testing.assert_close(out.float(), layer(x), atol=0.1, rtol=0.1)
