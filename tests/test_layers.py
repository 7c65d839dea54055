"""The layers: their formulas, parameters and options, and that no fault of the published packages came along."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from layers import heads_of, make, plain_attention, randn

from mmca_ext import (
    MGQA,
    MultiModalCausalAttention,
    MultiModalCrossAttention,
    RotaryEmbedding,
    SimpleMMCA,
    functional,
    reference,
)
from mmca_ext.nn._heads import merge_heads, split_heads

X, CONTEXT = randn(4, 5, 24), randn(4, 7, 16, seed=1)


def cross_attention(**kwargs):
    return make(MultiModalCrossAttention, 24, 4, 16, 8, **kwargs)  # heads * dim_head = 32, neither 24 nor 16


# ---------------------------------------------------------------- MultiModalCrossAttention


@pytest.mark.parametrize("strategy", [None, "concatenate", "average"])
@pytest.mark.parametrize("qk", [False, True])
@pytest.mark.parametrize("post", [False, True])
def test_cross_attention_formula(strategy, qk, post):
    layer = cross_attention(attention_strategy=strategy, qk=qk, post_attn_norm=post)
    for p in layer.parameters():  # also the norms' weights away from 1
        torch.nn.init.normal_(p, std=0.3)
    query, key, value = X @ layer.to_q.weight.T, CONTEXT @ layer.to_k.weight.T, CONTEXT @ layer.to_v.weight.T
    if qk:
        query = F.layer_norm(query, (32,), layer.norm_q.weight, layer.norm_q.bias)
        key = F.layer_norm(key, (32,), layer.norm_k.weight, layer.norm_k.bias)
    heads = plain_attention(*(heads_of(t, 4) for t in (query, key, value)))
    merged = heads.mean(1) if strategy == "average" else torch.cat(heads.unbind(1), dim=-1)
    if post:
        merged = F.layer_norm(merged, merged.shape[-1:], layer.norm_post_attn.weight, layer.norm_post_attn.bias)
    expected = merged @ layer.to_out[0].weight.T + layer.to_out[0].bias
    out = layer(X, CONTEXT)
    assert out.shape == X.shape
    torch.testing.assert_close(out, expected)


def test_cross_attention_parameter_names():
    base = ["to_k.weight", "to_out.0.bias", "to_out.0.weight", "to_q.weight", "to_v.weight"]
    assert sorted(cross_attention(mask=torch.ones(5, 7).bool()).state_dict()) == base
    norms = [f"norm_{n}.{p}" for n in ("k", "post_attn", "q") for p in ("bias", "weight")]
    assert sorted(cross_attention(qk=True, post_attn_norm=True).state_dict()) == sorted(base + norms)
    assert cross_attention(attention_strategy="average").to_out[0].weight.shape == (24, 8)
    assert cross_attention(qk=True).norm_q.weight.shape == (32,)


def test_old_checkpoints_with_unused_norms_load_strictly():
    old = cross_attention().state_dict()
    for name in ("norm_q", "norm_k"):
        old |= {f"{name}.weight": torch.ones(24), f"{name}.bias": torch.zeros(24)}
    keys = set(old)
    cross_attention().load_state_dict(old, strict=True)
    assert set(old) == keys  # the caller's dictionary stays whole
    model = torch.nn.Sequential(cross_attention())
    model.load_state_dict({f"0.{k}": v for k, v in old.items()}, strict=True)
    with pytest.raises(RuntimeError, match="surprise"):
        cross_attention().load_state_dict(old | {"surprise": torch.ones(1)}, strict=True)
    with pytest.raises(RuntimeError, match="Missing"):  # a norm that is asked for is not optional
        cross_attention(qk=True).load_state_dict(cross_attention().state_dict(), strict=True)


MASKS = {
    "(N, M)": randn(5, 7, seed=3) > 0,
    "(1, M)": randn(1, 7, seed=3) > 0,
    "(B, N, M)": randn(4, 5, 7, seed=3) > 0,  # B == heads
    "(B, 1, M)": randn(4, 1, 7, seed=3) > 0,
    "(1, N, M)": randn(1, 5, 7, seed=3) > 0,
    "(B, H, N, M)": randn(4, 4, 5, 7, seed=3) > 0,
    "(1, H, 1, M)": randn(1, 4, 1, 7, seed=3) > 0,
}


def as_4d(mask):
    return mask[None, None] if mask.dim() == 2 else mask[:, None] if mask.dim() == 3 else mask


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks_are_read_by_rank(mask):
    layer = cross_attention()
    projections = (heads_of(t, 4) for t in (layer.to_q(X), layer.to_k(CONTEXT), layer.to_v(CONTEXT)))
    expected = layer.to_out(merge_heads(plain_attention(*projections, as_4d(mask))))
    torch.testing.assert_close(layer(X, CONTEXT, mask), expected)
    torch.testing.assert_close(layer(X, CONTEXT, mask=mask.long()), expected)
    torch.testing.assert_close(cross_attention(mask=mask)(X, CONTEXT), expected)
    layer.mask = mask.int()
    torch.testing.assert_close(layer(X, CONTEXT), expected)


def test_masks_combine():
    first, second, padding = MASKS["(N, M)"], MASKS["(B, H, N, M)"], randn(4, 7, seed=5) > 0
    layer = cross_attention(mask=first)
    expected = cross_attention()(X, CONTEXT, as_4d(first) & second & padding[:, None, None])
    torch.testing.assert_close(layer(X, CONTEXT, second, padding), expected)
    torch.testing.assert_close(layer(X, CONTEXT, second, padding.int()), expected)


def test_mask_is_a_buffer_outside_the_state_dict():
    layer = cross_attention(mask=torch.ones(5, 7, dtype=torch.int64))
    assert "mask" in dict(layer.named_buffers()) and "mask" not in layer.state_dict()
    assert layer.to("meta").mask.device.type == "meta"
    layer = cross_attention()
    layer.mask = MASKS["(N, M)"]
    assert dict(layer.named_buffers())["mask"] is MASKS["(N, M)"] and "mask" not in layer.state_dict()
    torch.testing.assert_close(copy.deepcopy(layer)(X, CONTEXT), layer(X, CONTEXT))
    layer.mask = None
    torch.testing.assert_close(layer(X, CONTEXT), cross_attention()(X, CONTEXT))


@pytest.mark.parametrize("shape", [(7,), (5, 6), (4, 7), (3, 5, 7), (4, 3, 5, 7), (1, 4, 4, 5, 7)])
def test_other_mask_shapes_are_errors_that_list_the_accepted(shape):
    mask = torch.ones(shape, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"\(N\|1, M\), \(B\|1, N\|1, M\) or \(B\|1, H\|1, N\|1, M\)"):
        cross_attention(mask=mask)(X, CONTEXT)
    with pytest.raises(ValueError, match="mask must have shape"):
        cross_attention()(X, CONTEXT, mask)


# ---------------------------------------------------------------- MGQA


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_mgqa_formula(kv_heads, causal, qk_norm):
    layer = make(MGQA, 24, 4, kv_heads, 8, causal, qk_norm=qk_norm)
    query, key, value = (
        heads_of(p(X), h) for p, h in ((layer.to_q, 4), (layer.to_k, kv_heads), (layer.to_v, kv_heads))
    )
    if qk_norm:
        query, key = query / query.norm(dim=-1, keepdim=True), key / key.norm(dim=-1, keepdim=True)
        query = query * 10 * math.sqrt(8)
    key, value = (t.repeat_interleave(4 // kv_heads, 1) for t in (key, value))
    mask = torch.ones(5, 5).tril().bool() if causal else None
    expected = layer.to_out(torch.cat(plain_attention(query, key, value, mask).unbind(1), dim=-1))
    torch.testing.assert_close(layer(X), expected)
    assert sorted(layer.state_dict()) == ["to_k.weight", "to_out.weight", "to_q.weight", "to_v.weight"]


def test_mgqa_context_and_masks():
    layer = make(MGQA, 24, 4, 2, 8, context_dim=16)
    context_mask, attn_mask = randn(4, 7, seed=2) > 0, randn(4, 5, 7, seed=3) > 0
    expected = layer(X, CONTEXT, attn_mask=(attn_mask & context_mask[:, None]))
    torch.testing.assert_close(layer(X, CONTEXT, context_mask=context_mask, attn_mask=attn_mask.int()), expected)
    own = make(MGQA, 24, 4, 2, 8)
    padding = randn(4, 5, seed=2) > 0
    torch.testing.assert_close(own(X, mask=padding), own(X, attn_mask=padding[:, None]))
    with pytest.raises(ValueError, match="context_mask"):
        own(X, context_mask=padding)
    with pytest.raises(ValueError, match="context_mask"):
        layer(X, CONTEXT, mask=padding)
    with pytest.raises(ValueError, match="needs a context"):
        layer(X)


def test_mgqa_defaults():
    assert make(MGQA, 24).kv_heads == 8 and make(MGQA, 24).to_q.weight.shape == (512, 24)


# ---------------------------------------------------------------- SimpleMMCA

V, T = randn(4, 3, 24), randn(4, 6, 24, seed=1)


@pytest.mark.parametrize("causal", [False, True])
def test_simple_mmca_formula(causal):
    layer = make(SimpleMMCA, 24, 4, causal=causal, dim_head=8)
    visual, text = layer(V, T)
    torch.testing.assert_close(visual, layer.visual_self_attn(V))
    text_self = layer.textual_self_attn(T)
    torch.testing.assert_close(text, text_self + layer.cross_attn(text_self, visual))
    assert (
        layer.textual_self_attn.causal is causal and not layer.visual_self_attn.causal and not layer.cross_attn.causal
    )


def test_simple_mmca_keeps_the_whole_batch_and_free_lengths():
    layer = make(SimpleMMCA, 24, 4, dim_head=8)
    out = layer(V, T)
    assert type(out)._fields == ("visual", "text") and out.visual.shape == V.shape and out.text.shape == T.shape
    for b in range(4):
        torch.testing.assert_close(layer(V[b : b + 1], T[b : b + 1]).text, out.text[b : b + 1])


def test_simple_mmca_attends_across_modalities():
    layer = make(SimpleMMCA, 24, 4, dim_head=8)
    out, moved = layer(V, T), layer(V + 1.0, T)
    assert not torch.allclose(out.text, moved.text)  # the text sees the image,
    assert torch.equal(out.visual, layer(V, T + 1.0).visual)  # not the other way round
    later = T.clone()
    later[:, 4:] += 1.0
    torch.testing.assert_close(layer(V, later).text[:, :4], out.text[:, :4])  # and no text sees later text


def test_simple_mmca_padding():
    layer = make(SimpleMMCA, 24, 4, causal=False, dim_head=8)
    whole = layer(V[:, :2], T[:, :4])
    visual_mask, text_mask = torch.tensor([[1, 1, 0]] * 4), torch.tensor([[1, 1, 1, 1, 0, 0]] * 4).bool()
    padded = layer(V, T, visual_mask=visual_mask, text_mask=text_mask)
    torch.testing.assert_close(padded.visual[:, :2], whole.visual)
    torch.testing.assert_close(padded.text[:, :4], whole.text)


@pytest.mark.parametrize("heads, kv_heads", [(8, 2), (6, 2), (3, 1), (1, 1)])
def test_simple_mmca_kv_heads(heads, kv_heads):
    assert make(SimpleMMCA, 24, heads, dim_head=8).cross_attn.kv_heads == kv_heads


# ---------------------------------------------------------------- MultiModalCausalAttention

MODALITY = torch.tensor([[1, 2, 2, 1, 0], [2, 2, 1, 3, 1], [1, 1, 1, 1, 1], [0, 0, 2, 2, 1]])


@pytest.mark.parametrize("image_rows", ["self", "block", "causal", "self+text"])
@pytest.mark.parametrize("merge", ["sum", "lse"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_multimodal_causal_attention_formula(image_rows, merge, qk_norm):
    layer = make(MultiModalCausalAttention, 24, 4, 2, 8, image_rows=image_rows, merge=merge, qk_norm=qk_norm)
    q, k, v = (X @ layer.to_qkv.weight.T).split((32, 16, 16), dim=-1)
    q, k, v = heads_of(q, 4), heads_of(k, 2), heads_of(v, 2)
    kwargs = {"image_rows": image_rows, "merge": merge, "image_id": MODALITY * 2}
    if qk_norm:
        q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
        kwargs["scale"] = 10.0
    out = reference.mmca_attention(q, k, v, MODALITY, **kwargs)
    expected = torch.cat(out.unbind(1), dim=-1) @ layer.to_out.weight.T
    actual = layer(X, MODALITY, image_id=MODALITY * 2)
    torch.testing.assert_close(actual, expected)
    assert (actual[MODALITY == 0] == 0).all()
    assert sorted(layer.state_dict()) == ["to_out.weight", "to_qkv.weight"]


# ---------------------------------------------------------------- all layers


def layers(**kwargs):
    documented = {name: value for name, value in kwargs.items() if name != "flash"}
    return {
        "cross": (make(MultiModalCrossAttention, 24, 4, 16, 8, **documented), (X, CONTEXT)),
        "mgqa": (make(MGQA, 24, 4, 2, 8, True, **kwargs), (X,)),
        "mgqa rotary": (make(MGQA, 24, 4, 2, 8, True, rotary=RotaryEmbedding(8), **kwargs), (X,)),
        "mgqa context": (make(MGQA, 24, 4, 2, 8, context_dim=16, **kwargs), (X, CONTEXT)),
        "simple": (make(SimpleMMCA, 24, 4, dim_head=8, **kwargs), (V, T)),
        "causal": (make(MultiModalCausalAttention, 24, 4, 2, 8, image_rows="block", **kwargs), (X, MODALITY)),
        "gate": (make(MultiModalCausalAttention, 24, 4, 2, 8, merge="gate", **kwargs), (X, MODALITY)),
    }


NAMES = list(layers())


@pytest.fixture
def fresh_compiler():
    """One process compiles one function for a few kinds of layers only; here come more."""
    torch.compiler.reset()


def results(output):
    return list(output) if isinstance(output, tuple) else [output]


@pytest.mark.parametrize("name", NAMES[1:])  # the documented signature of the first has no such option
def test_flash_false_computes_the_same(name, monkeypatch):
    layer, args = layers()[name]
    expected = results(layer(*args))
    layer, _ = layers(flash=False)[name]
    monkeypatch.delattr(functional, "_attention")
    torch.testing.assert_close(results(layer(*args)), expected)


@pytest.mark.parametrize("name", NAMES)
def test_dropout_only_in_training(name):
    layer, args = layers(dropout=0.5)[name]
    without, _ = layers(dropout=0.0)[name]
    torch.testing.assert_close(results(layer(*args)), results(without(*args)))
    layer.train()
    torch.manual_seed(3)
    first = results(layer(*args))
    second = results(layer(*args))
    torch.manual_seed(3)
    assert torch.equal(results(layer(*args))[0], first[0])
    assert not torch.equal(first[-1], second[-1])


def test_dropout_acts_on_the_weights():
    """Not on the result: dropping every weight leaves the projection's bias; an output dropout would leave zeros."""
    layer = cross_attention(dropout=1.0).train()
    torch.testing.assert_close(layer(X, CONTEXT), layer.to_out[0].bias.expand(4, 5, -1))


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_a_gradient(name):
    options = {"qk": True, "post_attn_norm": True} if name == "cross" else {}
    layer, args = layers()[name] if not options else (cross_attention(**options), (X, CONTEXT))
    sum(r.square().sum() for r in results(layer(*args))).backward()
    for parameter_name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name


def test_rows_without_a_key_are_finite_in_gradients_too():
    mask = MASKS["(N, M)"].clone()
    mask[2] = False
    layer = cross_attention(mask=mask)
    out = layer(X, CONTEXT)
    torch.testing.assert_close(out[:, 2], layer.to_out[0].bias.expand(4, -1))
    out.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    own = make(MGQA, 24, 4, 2, 8)
    out = own(X, mask=torch.zeros(4, 5, dtype=torch.bool))
    assert (out == 0).all()
    out.sum().backward()
    assert all((p.grad == 0).all() for p in own.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    layer, args = layers()[name]
    small = [a[:1].clone().requires_grad_() if a.is_floating_point() else a[:1] for a in args]
    assert torch.autograd.gradcheck(lambda *xs: tuple(results(layer(*xs))), small)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_compiles_in_one_graph(name, training):
    layer, args = layers(dropout=0.0)[name]
    layer.train(training)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled(*args)), results(layer(*args)))
    dropping = layers(dropout=0.5)[name][0].train()
    out = results(torch.compile(dropping, fullgraph=True, backend="aot_eager")(*args))
    assert all(r.isfinite().all() for r in out)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", NAMES[1:])
def test_reference_compiles_in_one_graph(name):
    layer, args = layers(flash=False)[name]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled(*args)), results(layer(*args)))


def test_masked_layer_compiles_in_one_graph():
    layer = cross_attention(mask=MASKS["(N, M)"].long())
    args = X, CONTEXT, MASKS["(B, H, N, M)"].int(), torch.ones(4, 7, dtype=torch.int64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), layer(*args))


@pytest.mark.parametrize("name", NAMES)
def test_exports(name):
    layer, args = layers(dropout=0.0)[name]
    program = torch.export.export(layer, args)
    torch.testing.assert_close(results(program.module()(*args)), results(layer(*args)))


@pytest.mark.parametrize("name", NAMES)
def test_empty_batches_and_sequences(name):
    layer, args = layers()[name]
    for empty in ([a[:0] for a in args], [a[:, :0] for a in args]):
        for result, like in zip(results(layer(*empty)), results(layer(*args)), strict=True):
            assert result.numel() == 0 and result.shape[2] == like.shape[2]


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name):
    layer, args = layers(dropout=0.0)[name]
    layer, args = layer.float(), [a.float() if a.is_floating_point() else a for a in args]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = results(layer(*args))
    for actual, expected in zip(out, results(layer(*args)), strict=True):
        assert actual.dtype == torch.bfloat16
        torch.testing.assert_close(actual.float(), expected, atol=0.1, rtol=0.1)
    sum(r.float().square().sum() for r in out).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("name", NAMES[1:])
def test_autocast_without_flash(name):
    """The reference casts as the operators do."""
    outs = []
    for flash in (True, False):
        layer, args = layers(flash=flash)[name]
        layer, args = layer.float(), [a.float() if a.is_floating_point() else a for a in args]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outs.append(results(layer(*args)))
    for actual, expected in zip(*outs, strict=True):
        assert actual.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(actual, expected, atol=0.02, rtol=0.02)


def test_heads_are_split_and_merged_without_a_copy():
    x = randn(2, 5, 32)
    heads = split_heads(x, 4)
    assert heads.shape == (2, 4, 5, 8) and heads.data_ptr() == x.data_ptr()
    out = functional.attention(heads, heads, heads)
    assert merge_heads(out).data_ptr() == out.data_ptr()
    assert torch.equal(merge_heads(heads), x)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "error, says, call",
    [
        (ValueError, "attention_strategy.*'avrage'", lambda: cross_attention(attention_strategy="avrage")),
        (ValueError, "dropout.*1.5", lambda: cross_attention(dropout=1.5)),
        (TypeError, "mask.*float", lambda: cross_attention(mask=torch.ones(5, 7))),
        (ValueError, "mask.*0 and 1", lambda: cross_attention(mask=torch.full((5, 7), 2))),
        (ValueError, "mask.*shape", lambda: cross_attention(mask=torch.ones(7).bool())),
        (ValueError, "context_mask", lambda: cross_attention()(X, CONTEXT, context_mask=torch.ones(7).bool())),
        (ValueError, "context must", lambda: cross_attention()(X, X)),
        (ValueError, "batch", lambda: cross_attention()(X, CONTEXT[:2])),
        (ValueError, "x must", lambda: cross_attention()(X[0], CONTEXT)),
        (ValueError, "kv_heads.*3", lambda: MGQA(24, 4, 3)),
        (ValueError, "kv_heads.*3", lambda: SimpleMMCA(24, 4, 3)),
        (ValueError, "kv_heads.*0", lambda: SimpleMMCA(24, 4, 0)),
        (ValueError, "heads.*0", lambda: SimpleMMCA(24, 0)),
        (ValueError, "dim_head.*257", lambda: MGQA(24, 4, dim_head=257)),
        (ValueError, "v must", lambda: make(SimpleMMCA, 24, 4)(V[0], T)),
        (ValueError, "t must", lambda: make(SimpleMMCA, 24, 4)(V, CONTEXT)),
        (ValueError, "image_rows.*'itself'", lambda: MultiModalCausalAttention(24, 4, image_rows="itself")),
        (ValueError, "merge.*'mean'", lambda: MultiModalCausalAttention(24, 4, merge="mean")),
        (ValueError, "merge.*'none'", lambda: MultiModalCausalAttention(24, 4, merge="none")),
        (ValueError, "image_id", lambda: make(MultiModalCausalAttention, 24, 4)(X, MODALITY, MODALITY[:1])),
        (TypeError, "modality.*list", lambda: make(MultiModalCausalAttention, 24, 4)(X, MODALITY.tolist())),
        (ValueError, "softcap.*-1", lambda: MGQA(24, 4, softcap=-1)),
        (ValueError, "softcap.*'a'", lambda: MultiModalCausalAttention(24, 4, softcap="a")),
        (ValueError, "window.*3", lambda: MGQA(24, 4, window=3)),
        (TypeError, "rotary.*float", lambda: MGQA(24, 4, rotary=1e4)),
        (ValueError, "rotary.*dim_head=8", lambda: MGQA(24, 4, dim_head=8, rotary=RotaryEmbedding(64))),
        (TypeError, "bias.*bool", lambda: make(MGQA, 24, 4)(X, bias=torch.ones(5, 5).bool())),
        (TypeError, "context_mask.*list", lambda: cross_attention()(X, CONTEXT, context_mask=[1, 0])),
        (ValueError, "modality", lambda: make(MultiModalCausalAttention, 24, 4)(X, MODALITY[:, :3])),
    ],
)
def test_errors_name_the_argument_and_its_value(error, says, call):
    with pytest.raises(error, match=says):
        call()
