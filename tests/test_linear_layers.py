"""Layers with linear=True: against plain formulas, in training and in generation, and what has no linear form."""

import copy
import io
import math

import pytest
import torch
from layers import assert_same, heads_of, make, randn

from mmca_ext import MGQA, KVCache, LinearCache, MultiModalCausalAttention, RotaryEmbedding, SimpleMMCA
from mmca_ext.nn.multimodal_causal_attention import IMAGE_ROWS
from mmca_ext.reference.mmca import visible_groups

B, N, M = 3, 12, 7
X, CONTEXT = randn(B, N, 24), randn(B, M, 16, seed=1)
MASK = torch.tensor([[True] * 12, [False] * 3 + [True] * 9, [True] * 5 + [False] * 7])
CONTEXT_MASK = torch.tensor([[True] * 7, [True] * 4 + [False] * 3, [False] * 7])
MODALITY = torch.tensor(
    [
        [1, 1, 2, 2, 2, 1, 1, 3, 3, 1, 2, 1],
        [0, 0, 2, 2, 1, 3, 3, 2, 2, 1, 1, 1],
        [1, 2, 2, 2, 2, 1, 0, 0, 1, 2, 0, 0],
    ]
)
IMAGE_ID = torch.tensor([[0, 0, 1, 1, 2, 0, 0, 2, 2, 0, 5, 0], [0] * 12, [0, 1, 1, 2, 2, 0, 0, 0, 0, 2, 0, 0]])
CHUNKS = [[5, *[1] * 7], [1] * 12, [4, 3, 5], [12], [0, 2, 0, 10]]

both = pytest.mark.parametrize("flash", [False, True])
chunked = pytest.mark.parametrize("chunks", CHUNKS, ids=str)
image_rows = pytest.mark.parametrize("rows", IMAGE_ROWS)
merges = pytest.mark.parametrize("merge", ["sum", "gate"])


def phi(x):
    return torch.where(x > 0, x + 1, x.exp())


def average(query, key, value, visible):
    """Rows (B, H, N, Dv): the values' average with weights phi(q) . phi(k) over the visible keys; 0 where none is."""
    weights = (phi(query) @ phi(key).mT) * visible
    total = weights.sum(-1, keepdim=True)
    return (weights @ value) / total.masked_fill(total == 0, 1.0)


def projections(layer, x, context):
    share = layer.heads // layer.kv_heads
    key, value = (heads_of(t, layer.kv_heads) for t in (layer.to_k(context), layer.to_v(context)))
    return heads_of(layer.to_q(x), layer.heads), key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)


def merged(heads):
    return heads.transpose(1, 2).flatten(2)


def mgqa(*args, **kwargs):
    return make(MGQA, 24, 4, 2, 8, linear=True, **kwargs)


# ---------------------------------------------------------------- MGQA


@both
@pytest.mark.parametrize("causal", [False, True])
def test_self_attention(causal, flash):
    layer = mgqa(causal=causal, flash=flash)
    visible = MASK[:, None, None, :].expand(B, 1, N, N)
    if causal:
        visible = visible & torch.ones(N, N, dtype=torch.bool).tril()
    expected = layer.to_out(merged(average(*projections(layer, X, X), visible)))
    assert_same(layer(X, mask=MASK), expected)
    assert (layer(X, mask=MASK)[1, :3] == 0).all() or not causal  # nothing is to the left


@both
@pytest.mark.parametrize("causal", [False, True])
def test_cross_attention(causal, flash):
    layer = mgqa(causal=causal, flash=flash, context_dim=16)
    visible = CONTEXT_MASK[:, None, None, :].expand(B, 1, N, M)
    if causal:  # bottom-right: the first rows stand before the first key
        visible = visible & torch.ones(N, M, dtype=torch.bool).tril(M - N)
    expected = layer.to_out(merged(average(*projections(layer, X, CONTEXT), visible)))
    assert_same(layer(X, CONTEXT, context_mask=CONTEXT_MASK), expected)


@both
@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences(causal, flash):
    layer, lengths, keys = mgqa(causal=causal, flash=flash), [5, 0, 1, 6], [3, 2, 0, 7]
    offsets, key_offsets = (torch.tensor([0, *torch.tensor(n).cumsum(0)]) for n in (lengths, keys))
    packed, context = randn(12, 24), randn(12, 24, seed=3)
    expected = torch.cat([layer(x[None])[0] for x in packed.split(lengths)])
    assert_same(layer(packed, cu_seqlens=offsets, max_seqlen=6), expected)
    pairs = zip(packed.split(lengths), context.split(keys), strict=True)
    expected = torch.cat([layer(x[None], c[None])[0] for x, c in pairs])
    assert_same(layer(packed, context, cu_seqlens=offsets, context_cu_seqlens=key_offsets), expected)


def step_by_step(layer, chunks, *inputs, cache=None, **kwargs):
    """The rows of calls on consecutive chunks of inputs (B, N, ...) and of keyword tensors (..., N)."""
    cache = LinearCache.for_layer(layer, len(inputs[0])) if cache is None else cache
    rows, begin = [], 0
    with torch.no_grad():
        for count in chunks:
            part = slice(begin, begin + count)
            given = {name: value[..., part] for name, value in kwargs.items()}
            rows.append(layer(*(t[:, part] for t in inputs), **given, cache=cache))
            begin += count
    assert cache.length == begin
    return torch.cat(rows, 1)


@both
@chunked
def test_generation_gives_the_rows_of_training(chunks, flash):
    layer = mgqa(causal=True, flash=flash)
    assert_same(step_by_step(layer, chunks, X), layer(X).detach())
    assert_same(step_by_step(layer, chunks, X, mask=MASK), layer(X, mask=MASK).detach())


@both
def test_a_context_is_encoded_once(flash):
    layer = mgqa(flash=flash, context_dim=16)
    cache = layer.cache_context(CONTEXT, CONTEXT_MASK)
    assert cache.frozen and cache.length == M
    expected = layer(X, CONTEXT, context_mask=CONTEXT_MASK)
    assert_same(layer(X, cache=cache), expected)
    assert_same(torch.cat([layer(X[:, i : i + 1], cache=cache) for i in range(N)], 1), expected)
    with pytest.raises(ValueError, match="frozen"):
        cache.reset()


# ---------------------------------------------------------------- SimpleMMCA


@both
def test_simple_mmca_is_its_three_layers(flash):
    layer = make(SimpleMMCA, 24, 4, dim_head=8, linear=True, flash=flash)
    visual, text = layer(X[:, :5], X, MASK[:, :5], MASK)
    assert_same(visual, layer.visual_self_attn(X[:, :5], mask=MASK[:, :5]))
    own = layer.textual_self_attn(X, mask=MASK)
    assert_same(text, own + layer.cross_attn(own, visual, context_mask=MASK[:, :5]))
    assert layer.textual_self_attn.causal and all(part.linear for part in layer.children())


@chunked
@pytest.mark.parametrize("masked", [False, True])
def test_simple_mmca_decodes(chunks, masked):
    layer = make(SimpleMMCA, 24, 4, dim_head=8, linear=True)
    visual_mask, text_mask = (MASK[:, 2:9], MASK) if masked else (None, None)
    expected = layer(X[:, 2:9], X, visual_mask, text_mask).text.detach()
    with torch.no_grad():
        cache, rows, begin = layer.make_cache(X[:, 2:9], visual_mask=visual_mask), [], 0
        for count in chunks:
            part = slice(begin, begin + count)
            rows.append(layer.decode(X[:, part], cache, None if text_mask is None else text_mask[:, part]))
            begin += count
    assert_same(torch.cat(rows, 1), expected)


# ---------------------------------------------------------------- MultiModalCausalAttention


def mmca(rows, merge="sum", **kwargs):
    layer = make(MultiModalCausalAttention, 24, 4, 2, 8, image_rows=rows, merge=merge, linear=True, **kwargs)
    if merge == "gate":
        layer.image_gate.data.copy_(torch.tensor([0.5, -1.0, 0.0, 2.0]))
    return layer


def by_formula(layer, x, modality, image_id=None):
    """Each row averages what the modality rule shows it of each group; its own value is an average of one."""
    heads = heads_of(layer.to_qkv(x), layer.heads + 2 * layer.kv_heads)
    query, key, value = heads.split((layer.heads, layer.kv_heads, layer.kv_heads), 1)
    key, value = (t.repeat_interleave(layer.heads // layer.kv_heads, 1) for t in (key, value))
    text, image, _ = visible_groups(modality, torch.arange(x.shape[1]), layer.image_rows, image_id)
    weight = 1.0
    if layer.merge == "gate":
        weight = torch.where(modality[:, None, :, None] >= 2, 1.0, layer.image_gate.tanh()[None, :, None, None])
    parts = [average(query, key, value, visible[:, None]) for visible in (text, image)]
    return layer.to_out(merged(parts[0] + weight * parts[1]))


@both
@image_rows
@merges
@pytest.mark.parametrize("ids", [None, IMAGE_ID], ids=["runs", "image_id"])
def test_mmca(rows, merge, ids, flash):
    layer = mmca(rows, merge, flash=flash)
    out = layer(X, MODALITY, ids)
    assert_same(out, by_formula(layer, X, MODALITY, ids if rows == "block" else None))
    assert (out[MODALITY == 0] == 0).all()


@image_rows
@merges
def test_packed_mmca(rows, merge):
    layer, lengths = mmca(rows, merge), [5, 0, 1, 6]
    offsets, modality, ids = torch.tensor([0, 5, 5, 6, 12]), MODALITY[0], IMAGE_ID[0]
    packed = randn(15, 24)
    modality, ids = (torch.cat((t, torch.tensor([2, 2, 1]))) for t in (modality, ids))  # past the last offset: nothing
    rest = zip(packed[:12].split(lengths), modality[:12].split(lengths), ids[:12].split(lengths), strict=True)
    expected = torch.cat([layer(x[None], m[None], i[None])[0] for x, m, i in rest])
    out = layer(packed, modality, ids, cu_seqlens=offsets)
    assert_same(out[:12], expected)
    assert (out[12:] == 0).all()


@both
@image_rows
@merges
@chunked
def test_mmca_generation_gives_the_rows_of_training(rows, merge, chunks, flash):
    layer = mmca(rows, merge, flash=flash)
    if rows == "block":  # whose images must come whole
        chunks = [2, 3, 2, 2, 1, 1, 1]
        modality = MODALITY[:1].expand(B, N)
        assert_same(step_by_step(layer, chunks, X, modality), layer(X, modality).detach())
        return
    assert_same(step_by_step(layer, chunks, X, MODALITY), layer(X, MODALITY).detach())


def test_an_image_in_two_calls_is_refused():
    layer = mmca("block")
    cache = LinearCache.for_layer(layer, 1)
    with torch.no_grad():
        layer(X[:1, :4], MODALITY[:1, :4], cache=cache)
        with pytest.raises(ValueError, match="append an image in one call"):
            layer(X[:1, 4:], MODALITY[:1, 4:], cache=cache)
        layer(X[:1, 4:], MODALITY[:1, 4:], torch.full((1, 8), 9), cache=cache)  # another image


def test_a_gate_of_zero_is_text_alone_and_has_a_gradient():
    layer = make(MultiModalCausalAttention, 24, 4, dim_head=8, merge="gate", image_rows="causal", linear=True)
    text = MODALITY == 1
    out = layer(X, MODALITY)
    alone = layer(X, torch.where(text, 1, 0))
    assert_same(out[text], alone[text])
    out.square().sum().backward()
    assert (layer.image_gate.grad != 0).all()


# ---------------------------------------------------------------- training

LAYERS = {
    "MGQA": (lambda **kw: MGQA(24, 4, 2, 8, causal=True, linear=True, **kw), lambda layer, x: layer(x, mask=MASK)),
    "SimpleMMCA": (lambda **kw: SimpleMMCA(24, 4, dim_head=8, linear=True, **kw), lambda layer, x: layer(x, x).text),
    "mmca": (
        lambda **kw: MultiModalCausalAttention(24, 4, dim_head=8, merge="gate", linear=True, **kw),
        lambda layer, x: layer(x, MODALITY),
    ),
    "mmca block": (
        lambda **kw: MultiModalCausalAttention(24, 4, dim_head=8, image_rows="block", linear=True, **kw),
        lambda layer, x: layer(x, MODALITY, IMAGE_ID),
    ),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


@every_layer
def test_gradients_are_the_references(name):
    found = []
    for flash in (False, True):
        torch.manual_seed(0)
        layer = LAYERS[name][0](dropout=0.0, flash=flash).double()
        x = X.clone().requires_grad_()
        LAYERS[name][1](layer, x).sin().sum().backward()
        found.append([x.grad, *(p.grad for p in layer.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@every_layer
def test_dropout_acts_in_training_alone(name):
    torch.manual_seed(0)
    layer = LAYERS[name][0](dropout=0.5).double()
    a, b = LAYERS[name][1](layer, X), LAYERS[name][1](layer, X)
    assert not torch.equal(a, b)
    layer.eval()
    c = LAYERS[name][1](layer, X)
    assert torch.equal(c, LAYERS[name][1](layer, X)) and not torch.equal(a, c)
    plain = LAYERS[name][0](dropout=0.0).double()
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(c, LAYERS[name][1](plain, X))


@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name, dtype):
    torch.manual_seed(0)
    layer = LAYERS[name][0](dropout=0.0).float()
    x = X.float().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        out = LAYERS[name][1](layer, x)
    assert out.dtype == dtype
    out.float().sum().backward()
    assert x.grad.dtype == torch.float32 and x.grad.isfinite().all()
    exact = LAYERS[name][1](copy.deepcopy(layer).double(), X)
    # The rounding of two projections and of the heads between them: averages of numbers of about 1, sums of 32 of them.
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=8 * math.sqrt(32) * torch.finfo(dtype).eps)


@every_layer
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(name, dynamic):
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = LAYERS[name][0](dropout=0.0).double()
    compiled = torch.compile(lambda x: LAYERS[name][1](layer, x), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    x = X.clone().requires_grad_()
    out, expected = compiled(x), LAYERS[name][1](layer, x)
    assert_same(out, expected)
    assert_same(*(torch.autograd.grad(t.sin().sum(), x)[0] for t in (out, expected)))


@every_layer
def test_checkpoints_are_those_of_softmax_layers(name):
    torch.manual_seed(0)
    linear = LAYERS[name][0]()
    kind = type(linear)
    softmax = {
        "MGQA": lambda: kind(24, 4, 2, 8),
        "SimpleMMCA": lambda: kind(24, 4, dim_head=8),
        "mmca": lambda: kind(24, 4, dim_head=8, merge="gate"),
        "mmca block": lambda: kind(24, 4, dim_head=8),
    }[name]()
    softmax.load_state_dict(linear.state_dict())
    file = io.BytesIO()
    torch.save(linear, file)
    file.seek(0)
    linear.eval(), torch.load(file, weights_only=False)
    assert "linear=True" in repr(linear) and "linear=False" in repr(softmax)


# ---------------------------------------------------------------- the cache


def test_beams_and_copies():
    layer = mmca("causal")
    cache, index = LinearCache.for_layer(layer, B), torch.tensor([2, 0, 0])
    with torch.no_grad():
        layer(X[:, :8], MODALITY[:, :8], cache=cache)
        kept = cache.copy()
        cache.reorder(index)
        following = layer(X[:, 8:], MODALITY[:, 8:], cache=cache)
        beams = X[index].clone()
        beams[:, 8:] = X[:, 8:]
        ids = MODALITY[index].clone()
        ids[:, 8:] = MODALITY[:, 8:]
        assert_same(following, layer(beams, ids)[:, 8:])
        assert kept.length == 8 and cache.length == 12
        assert_same(layer(X[:, 8:], MODALITY[:, 8:], cache=kept), layer(X, MODALITY)[:, 8:])
        kept.reset()
        assert_same(layer(X, MODALITY, cache=kept), layer(X, MODALITY))


def test_a_token_costs_the_same_however_many_came_before():
    """The cache's memory is that of its states: constant."""
    layer = mgqa(causal=True)
    cache = LinearCache.for_layer(layer, 1)
    sizes = set()
    with torch.no_grad():
        for _ in range(5):
            layer(randn(1, 100, 24), cache=cache)
            sizes.add(sum(t.untyped_storage().nbytes() for t in cache.states[0]))
    assert sizes == {2 * 8 * (8 + 1) * 8} and cache.length == 500


# ---------------------------------------------------------------- what has no linear form

IDS = MODALITY[:, :3]


@pytest.mark.parametrize(
    "error, says, call",
    [
        (ValueError, "qk_norm.*linear", lambda: MGQA(24, qk_norm=True, linear=True)),
        (ValueError, "softcap.*linear", lambda: MGQA(24, softcap=3.0, linear=True)),
        (ValueError, "window.*linear", lambda: MGQA(24, window=(3, 0), linear=True)),
        (ValueError, "rotary.*linear", lambda: MGQA(24, rotary=RotaryEmbedding(64), linear=True)),
        (ValueError, "qk_norm.*linear", lambda: SimpleMMCA(24, 4, qk_norm=True, linear=True)),
        (ValueError, "softcap.*linear", lambda: MultiModalCausalAttention(24, 4, softcap=3.0, linear=True)),
        (ValueError, "qk_norm.*linear", lambda: MultiModalCausalAttention(24, 4, qk_norm=True, linear=True)),
        (ValueError, "rotary.*linear", lambda: mmca("self", rotary=RotaryEmbedding(8))),
        (ValueError, 'merge="lse".*"sum" or "gate"', lambda: mmca("self", "lse")),
        (ValueError, "attn_mask.*linear", lambda: mgqa()(X, attn_mask=torch.ones(N, N) > 0)),
        (ValueError, "bias.*linear", lambda: mgqa()(X, bias=torch.ones(N, N))),
        (ValueError, "bias.*linear", lambda: mgqa(context_dim=16)(X, CONTEXT, bias=torch.ones(N, M))),
        (ValueError, "positions", lambda: mgqa()(X, positions=torch.arange(N))),
        (ValueError, "positions", lambda: mmca("self")(X, MODALITY, positions=torch.arange(N))),
        (ValueError, "needs a context", lambda: mgqa(context_dim=16)(X)),
        (ValueError, "context_mask", lambda: mgqa()(X, context_mask=MASK)),
        (ValueError, "modality.*-1", lambda: mmca("self")(X, MODALITY - 1)),
        (TypeError, "modality.*float", lambda: mmca("self")(X, MODALITY.float())),
        (ValueError, "modality", lambda: mmca("self")(X, IDS)),
        (TypeError, "LinearCache.*KVCache", lambda: mgqa()(X, cache=KVCache(B, 12, 2, 8, dtype=torch.float64))),
        (TypeError, "KVCache.*LinearCache", lambda: make(MGQA, 24, 4, 2, 8)(X, cache=LinearCache(B, 2, 8))),
        (ValueError, "cache is for", lambda: mgqa()(X, cache=LinearCache(2, 2, 8))),
        (ValueError, "groups", lambda: mmca("self")(X, MODALITY, cache=LinearCache(B, 2, 8))),
        (TypeError, "LinearCache.for_layer", lambda: KVCache.for_layer(mgqa(), 1, 10)),
        (TypeError, "linear=True", lambda: LinearCache.for_layer(make(MGQA, 24, 4), 1)),
        (ValueError, "batch.*-1", lambda: LinearCache(-1, 2, 8)),
        (ValueError, "kv_heads.*0", lambda: LinearCache(1, 0, 8)),
        (ValueError, "no_grad", lambda: mgqa(causal=True)(X, cache=LinearCache(B, 2, 8))),
        (TypeError, "index.*list", lambda: LinearCache(B, 2, 8).reorder([0, 1, 2])),
        (ValueError, "index", lambda: LinearCache(B, 2, 8).reorder(torch.tensor([0, 1]))),
        (ValueError, "index.*3", lambda: LinearCache(B, 2, 8).reorder(torch.tensor([0, 1, 3]))),
        (
            ValueError,
            "causal=True needs the context",
            lambda: mgqa(causal=True, context_dim=16)(X, cache=mgqa(context_dim=16).cache_context(CONTEXT)),
        ),
    ],
)
def test_errors_name_the_argument(error, says, call):
    with pytest.raises(error, match=says):
        call()
