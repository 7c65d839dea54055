"""Our layers timed whole, against the same layers written around SDPA and around einsum, with the same parameters.

Without dropout, so that the results can be compared; the backward gives the gradients of inputs and parameters.
"""

import torch

import mmca_ext

from . import peers
from .cases import Case

ATTEND = {"SDPA": peers.sdpa, "eager": peers.eager}


def split(features, heads):
    return features.unflatten(-1, (heads, -1)).transpose(1, 2)


def written_out(layer, x, context, attend):
    """MultiModalCrossAttention or MGQA."""
    query = split(layer.to_q(x), layer.heads)
    kv_heads, is_causal = getattr(layer, "kv_heads", layer.heads), getattr(layer, "causal", False)
    key, value = split(layer.to_k(context), kv_heads), split(layer.to_v(context), kv_heads)
    return layer.to_out(attend(query, key, value, is_causal=is_causal).transpose(1, 2).flatten(2))


def simple_mmca(layer, visual, text, attend):
    visual = written_out(layer.visual_self_attn, visual, visual, attend)
    text = written_out(layer.textual_self_attn, text, text, attend)
    return visual, text + written_out(layer.cross_attn, text, visual, attend)


def case(name, label, size, layer, call, shapes):
    return Case(
        name,
        layer,
        {peer: lambda *inputs, attend=attend: call(layer, *inputs, attend) for peer, attend in ATTEND.items()},
        shapes,
        0,
        parameters=list(layer.parameters()),
        label=label,
        size=size,
    )


def cross_case(name, batch, rows, keys, dim, context_dim):
    torch.manual_seed(0)
    layer = mmca_ext.MultiModalCrossAttention(dim, 8, context_dim, dropout=0.0)
    size = f"batch {batch}, {rows} rows of {dim}, {keys} keys of {context_dim}, 8 heads of 64"
    shapes = (batch, rows, dim), (batch, keys, context_dim)
    return case(name, "MultiModalCrossAttention", size, layer, written_out, shapes)


def simple_mmca_case(name, batch, visual, text):
    torch.manual_seed(0)
    layer = mmca_ext.SimpleMMCA(512, 8, dropout=0.0)
    size = f"batch {batch}, {visual} visual and {text} text tokens of 512, 8/2 heads of 64"
    return case(name, "SimpleMMCA", size, layer, simple_mmca, ((batch, visual, 512), (batch, text, 512)))


def layer_cases():
    return [
        cross_case("layer MultiModalCrossAttention, 128 rows, 576 keys", 4, 128, 576, 512, 768),
        cross_case("layer MultiModalCrossAttention, the document's size", 1, 32, 32, 1024, 1024),
        simple_mmca_case("layer SimpleMMCA, 576 visual, 256 text", 2, 576, 256),
        simple_mmca_case("layer SimpleMMCA, the document's size", 32, 10, 10),
    ]
