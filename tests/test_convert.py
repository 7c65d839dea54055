"""Checkpoints of mmqqa, whose query head h uses KV head h % kv_heads, in our layers, whose heads lie in groups."""

import pytest
import torch
from layers import assert_same, heads_of, make, plain_attention, randn

from mmca_ext import MGQA, MultiModalCrossAttention, SimpleMMCA
from mmca_ext.nn import from_mmqqa, to_mmqqa

X = randn(2, 5, 24)


def modulo_attention(state, x, context, heads, kv_heads):
    """Attention with the published head order, from the weights of one layer."""
    query = heads_of(x @ state["to_q.weight"].T, heads)
    key, value = (heads_of(context @ state[f"{name}.weight"].T, kv_heads) for name in ("to_k", "to_v"))
    used = [h % kv_heads for h in range(heads)]
    out = plain_attention(query, key[:, used], value[:, used])
    return torch.cat(out.unbind(1), dim=-1) @ state["to_out.weight"].T


def child(state, prefix):
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


@pytest.mark.parametrize("heads, kv_heads", [(8, 2), (6, 3), (4, 1), (4, 4), (8, 4)])
def test_a_published_layer_computes_the_same_here(heads, kv_heads):
    published = make(MGQA, 24, heads, kv_heads, 8).state_dict()
    layer = make(MGQA, 24, heads, kv_heads, 8, seed=2)
    layer.load_state_dict(from_mmqqa(published, heads, kv_heads), strict=True)
    assert_same(layer(X), modulo_attention(published, X, X, heads, kv_heads))
    if 1 < kv_heads < heads:  # where the order matters
        layer.load_state_dict(published)
        assert not torch.allclose(layer(X), modulo_attention(published, X, X, heads, kv_heads))


def test_a_whole_model_converts():
    published = make(SimpleMMCA, 24, 8, 2, causal=False, dim_head=8).state_dict()
    layer = make(SimpleMMCA, 24, 8, 2, causal=False, dim_head=8, seed=2)
    layer.load_state_dict(from_mmqqa(published, 8, 2), strict=True)
    image, text = X, randn(2, 3, 24, seed=1)
    visual = modulo_attention(child(published, "visual_self_attn."), image, image, 8, 2)
    text = modulo_attention(child(published, "textual_self_attn."), text, text, 8, 2)
    text = text + modulo_attention(child(published, "cross_attn."), text, visual, 8, 2)
    out = layer(image, randn(2, 3, 24, seed=1))
    assert_same(out.visual, visual)
    assert_same(out.text, text)


def test_there_and_back_is_bitwise_the_same_and_leaves_the_argument_alone():
    state = make(SimpleMMCA, 24, 6, 3, dim_head=8).state_dict()
    copy = {key: value.clone() for key, value in state.items()}
    there = from_mmqqa(state, 6, 3)
    assert list(there) == list(state) and not torch.equal(
        there["cross_attn.to_q.weight"], state["cross_attn.to_q.weight"]
    )
    for back in (to_mmqqa(there, 6, 3), from_mmqqa(to_mmqqa(state, 6, 3), 6, 3)):
        assert all(torch.equal(back[key], value) for key, value in state.items())
    assert all(torch.equal(state[key], value) for key, value in copy.items())


def test_other_keys_and_other_prefixes_pass_unchanged():
    attention = make(MGQA, 24, 8, 2, 8).state_dict()
    cross = make(MultiModalCrossAttention, 24, 8, 24, 8).state_dict()  # its to_out.0.weight says that it is no MGQA
    state = {f"{p}.{k}": v for p, d in (("a", attention), ("b", attention), ("c", cross)) for k, v in d.items()}
    state["embedding.weight"] = randn(3, 24)
    converted = from_mmqqa(state, 8, 2, prefix="b.")
    moved = {key for key in state if converted[key] is not state[key]}
    assert moved == {"b.to_q.weight", "b.to_out.weight"}
    assert {key for key in state if from_mmqqa(state, 8, 2)[key] is not state[key]} == moved | {
        "a.to_q.weight",
        "a.to_out.weight",
    }


@pytest.mark.parametrize(
    "says, call",
    [
        ("kv_heads must divide heads=8, got 3", lambda state: from_mmqqa(state, 8, 3)),
        ("heads.*0", lambda state: from_mmqqa(state, 0, 2)),
        ("to_q, to_k and to_out.*heads=8, kv_heads=4", lambda state: from_mmqqa(state, 8, 4)),
        ("to_q, to_k and to_out.*heads=16", lambda state: to_mmqqa(state, 16, 2)),
        (r"no MGQA \(model\.to_k\.weight, model\.to_out", lambda state: from_mmqqa(state, 8, 2, prefix="model.")),
        ("no MGQA", lambda state: from_mmqqa({}, 8, 2)),
        (r"to_out.*\(24, 63\)", lambda state: from_mmqqa(state | {"to_out.weight": randn(24, 63)}, 8, 2)),
        (
            r"no MGQA \(to_k\.weight",
            lambda state: from_mmqqa({k: v for k, v in state.items() if "to_k" not in k}, 8, 2),
        ),
    ],
)
def test_errors(says, call):
    with pytest.raises(ValueError, match=says):
        call(make(MGQA, 24, 8, 2, 8).state_dict())
