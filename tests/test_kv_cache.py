"""The KVCache itself: what it shows, that it keeps to its memory and keeps no graph, and what it refuses."""

import pytest
import torch
from layers import make, randn

from mmca_ext import MGQA, KVCache, MultiModalCausalAttention, MultiModalCrossAttention, RotaryEmbedding, SimpleMMCA

BATCH, LENGTH = 3, 12
X, CONTEXT = randn(BATCH, LENGTH, 24), randn(BATCH, 7, 16, seed=1)
MODALITY = torch.ones(BATCH, LENGTH, dtype=torch.int64)


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def mgqa(**kwargs):
    return make(MGQA, 24, 4, 2, 8, causal=True, **kwargs)


def mmca():
    return make(MultiModalCausalAttention, 24, 4, 2, 8)


def filled(length=4, **kwargs):
    cache = KVCache(2, 6, 3, 5, value_dim=4, dtype=torch.float64, **kwargs)
    cache.append(randn(2, 3, length, 5), randn(2, 3, length, 4, seed=1))
    return cache


def test_views_show_what_was_appended():
    cache, key, value = KVCache(2, 6, 3, 5, 4, torch.float64), randn(2, 4, 3, 5).transpose(1, 2), randn(2, 3, 4, 4)
    assert cache.length == 0 and cache.keys.shape == (2, 3, 0, 5) and (cache.batch, cache.capacity) == (2, 6)
    cache.append(key[:, :, :1], value[:, :, :1])
    assert cache.key_mask is None
    cache.append(key[:, :, 1:], value[:, :, 1:], torch.tensor([[0, 2, 2], [1, 3, 0]]), torch.tensor([[7, 8, 9]] * 2))
    assert torch.equal(cache.keys, key) and torch.equal(cache.values, value)
    assert cache.modality.tolist() == [[1, 0, 2, 2], [1, 1, 3, 0]] and cache.modality.dtype == torch.int32
    assert cache.image_id.tolist() == [[1, 7, 8, 9]] * 2
    assert cache.key_mask.tolist() == [[True, False, True, True], [True, True, True, False]]
    cache.append(key[:, :, :2], value[:, :, :2], modality=0, image_id=3)
    assert cache.modality[:, 4:].tolist() == [[0, 0]] * 2 and cache.image_id[:, 4:].tolist() == [[3, 3]] * 2
    assert "length=6" in repr(cache)


def test_truncate_reset_and_reorder():
    cache = filled()
    keys, values = cache.keys.clone(), cache.values.clone()
    cache.reorder(torch.tensor([1, 1]))
    assert torch.equal(cache.keys, keys[[1, 1]]) and torch.equal(cache.values, values[[1, 1]])
    cache.truncate(2)
    assert cache.length == 2 and torch.equal(cache.keys, keys[[1, 1], :, :2])
    cache.append(keys[:, :, :1], values[:, :, :1], modality=0)
    cache.reset()
    assert cache.length == 0 and cache.key_mask is None


@pytest.mark.parametrize("name", ["mgqa", "mmca", "simple"])
def test_no_memory_is_allocated_again(name):
    layer = {"mgqa": mgqa, "mmca": mmca, "simple": lambda: make(SimpleMMCA, 24, 4)}[name]()
    cache = layer.make_cache(X, LENGTH) if name == "simple" else KVCache.for_layer(layer, BATCH, LENGTH)
    own = cache.text if name == "simple" else cache
    tensors = lambda: [own.keys, own.values, own.modality, own.image_id]  # noqa: E731
    start = [t.untyped_storage().data_ptr() for t in tensors()]
    for n in range(LENGTH):
        token = X[:, [n]]
        if name == "simple":
            layer.decode(token, cache)
        else:
            layer(token, *([torch.ones(BATCH, 1).int()] if name == "mmca" else []), cache=cache)
        assert [t.untyped_storage().data_ptr() for t in tensors()] == start
    own.reorder(torch.tensor([2, 1, 0]))
    assert [t.untyped_storage().data_ptr() for t in tensors()] == start


def test_no_graph_is_kept():
    layer, cache = mgqa(), KVCache.for_layer(mgqa(), BATCH, LENGTH)
    with torch.enable_grad():
        with pytest.raises(ValueError, match=r"requires a gradient.*torch.no_grad"):
            layer(X[:, :3], cache=cache)
        assert cache.length == 0
        frozen = mgqa().requires_grad_(False)
        assert not frozen(X[:, :3], cache=cache).requires_grad and not cache.keys.requires_grad
    with torch.inference_mode():
        layer(X[:, 3:], cache=cache)
    assert not cache.keys.requires_grad and cache.keys.grad_fn is None and cache.length == LENGTH


def test_for_layer_takes_heads_dtype_and_device():
    layer = make(MGQA, 24, 4, 2, 8).float().to("meta")
    cache = KVCache.for_layer(layer, 5, 9)
    assert cache._keys.shape == cache._values.shape == (5, 2, 9, 8) and cache._keys.is_contiguous()
    assert cache.keys.dtype == torch.float32 and cache.keys.device.type == "meta"
    assert KVCache.for_layer(layer, 5, 9, torch.bfloat16).keys.dtype == torch.bfloat16
    layer = make(MultiModalCausalAttention, 24, 4, 1, 8)
    assert KVCache.for_layer(layer, 0, 0).keys.shape == (0, 1, 0, 8)


K, V = randn(2, 3, 1, 5), randn(2, 3, 1, 4)


def context_cache():
    return make(MGQA, 24, 4, 2, 8, context_dim=16).cache_context(CONTEXT)


@pytest.mark.parametrize(
    "error, says, call",
    [
        (ValueError, "capacity.*-1", lambda: KVCache(2, -1, 3, 5)),
        (ValueError, "kv_heads.*0", lambda: KVCache(2, 6, 0, 5)),
        (TypeError, "dtype.*int64", lambda: KVCache(2, 6, 3, 5, dtype=torch.int64)),
        (
            TypeError,
            "layer.*MultiModalCrossAttention",
            lambda: KVCache.for_layer(make(MultiModalCrossAttention, 24, 4, 16), 1, 1),
        ),
        (
            ValueError,
            "4 of capacity=6 tokens, 3 more",
            lambda: filled().append(K.expand(2, 3, 3, 5), V.expand(2, 3, 3, 4)),
        ),
        (ValueError, r"key must have shape \(2, 3, n, 5\).*\(1, 3, 1, 5\)", lambda: filled().append(K[:1], V)),
        (ValueError, "key must have shape", lambda: filled().append(K[:, :2], V)),
        (ValueError, "key must have shape", lambda: filled().append(K[0], V)),
        (ValueError, r"value must have shape \(2, 3, n, 4\)", lambda: filled().append(K, K)),
        (ValueError, "differ in tokens: 1 and 2", lambda: filled().append(K, V.expand(2, 3, 2, 4))),
        (TypeError, "key.*float64.*float32", lambda: filled().append(K.float(), V)),
        (ValueError, "value.*device cpu, got meta", lambda: filled().append(K, V.to("meta"))),
        (TypeError, "key.*list", lambda: filled().append([1.0], V)),
        (ValueError, "modality must be 0.*-1", lambda: filled().append(K, V, torch.tensor([[1], [-1]]))),
        (ValueError, "modality must be 0.*-1", lambda: filled().append(K, V, -1)),
        (ValueError, r"modality must have shape \(2, 1\)", lambda: filled().append(K, V, torch.ones(2).int())),
        (TypeError, "modality.*bool", lambda: filled().append(K, V, torch.ones(2, 1).bool())),
        (TypeError, "image_id.*float32", lambda: filled().append(K, V, 1, torch.ones(2, 1))),
        (ValueError, "length.*0 to 4, got 5", lambda: filled().truncate(5)),
        (ValueError, "length.*-1", lambda: filled().truncate(-1)),
        (TypeError, "index.*list", lambda: filled().reorder([0, 1])),
        (ValueError, r"index must have shape \(2,\)", lambda: filled().reorder(torch.tensor([0]))),
        (ValueError, r"index.*\[0, 2\]", lambda: filled().reorder(torch.tensor([0, 2]))),
        (ValueError, "frozen", lambda: context_cache().append(K, V)),
        (ValueError, "frozen", lambda: context_cache().truncate(0)),
        (ValueError, "frozen", lambda: context_cache().reset()),
        (TypeError, "cache.*dict", lambda: mgqa()(X, cache={})),
        (ValueError, r"cache is for.*\(2, 3, 5\).*\(3, 2, 8\)", lambda: mgqa()(X, cache=filled())),
        (ValueError, "cache is for", lambda: mmca()(X, MODALITY, cache=filled())),
        (
            ValueError,
            "context_mask goes to",
            lambda: mgqa()(X, context_mask=torch.ones(3, 7).bool(), cache=context_cache()),
        ),
        (ValueError, "context does not go with cache", lambda: mgqa()(X, X, cache=context_cache())),
        (ValueError, "^mask is the padding", lambda: mgqa()(X, mask=torch.ones(3, 12).bool(), cache=context_cache())),
        (ValueError, "self-attention", lambda: mgqa(rotary=RotaryEmbedding(8))(X, cache=context_cache())),
        (ValueError, "needs a context", lambda: make(MGQA, 24, 4, 2, 8, context_dim=16)(X, cache=KVCache(3, 20, 2, 8))),
        (ValueError, "frozen", lambda: mmca()(X, MODALITY, cache=context_cache())),
        (
            ValueError,
            "cache_context",
            lambda: make(MultiModalCrossAttention, 24, 4, 16, 8)(X, cache=KVCache(3, 20, 4, 8)),
        ),
        (ValueError, "causal=True", lambda: make(SimpleMMCA, 24, 4, causal=False).make_cache(X, 20)),
        (TypeError, "cache.*KVCache", lambda: make(SimpleMMCA, 24, 4).decode(X, context_cache())),
    ],
)
def test_errors_name_the_argument_and_its_value(error, says, call):
    with pytest.raises(error, match=says):
        call()
