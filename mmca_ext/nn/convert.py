"""Checkpoints of the published mmqqa package."""

import torch

from ._heads import check_sizes


def from_mmqqa(state_dict, heads, kv_heads, prefix=""):
    """The same attention for our layers: mmqqa gives query head h the KV head h % kv_heads, we give it
    h // (heads / kv_heads), Llama's and Hugging Face's order; so the query heads, rows of to_q.weight and columns of
    to_out.weight, change places.

        layer = SimpleMMCA(dim, heads, kv_heads)
        layer.load_state_dict(from_mmqqa(torch.load("mmqqa.pt", weights_only=True), heads, kv_heads))

    Args:
        state_dict: of a published MGQA or SimpleMMCA, or of a model that holds some; it is not changed.
        heads, kv_heads: of these layers.
        prefix: convert only the layers whose keys start so.

    Returns:
        A new dict with the same keys, and the same tensors where nothing moves.

    Raises:
        ValueError: no such layer, or weights that do not fit these heads.
    """
    return _convert(state_dict, heads, kv_heads, prefix, _grouped_order(heads, kv_heads))


def to_mmqqa(state_dict, heads, kv_heads, prefix=""):
    """The inverse of `from_mmqqa`."""
    return _convert(state_dict, heads, kv_heads, prefix, _grouped_order(heads, kv_heads).argsort())


def _grouped_order(heads, kv_heads):
    """Where to find our query head h among mmqqa's: all that share KV head 0, then all that share KV head 1, ..."""
    check_sizes(heads=heads, kv_heads=kv_heads)
    if heads % kv_heads:
        raise ValueError(f"kv_heads must divide heads={heads}, got {kv_heads}")
    return torch.arange(heads).view(-1, kv_heads).T.flatten()


def _weights(layer):
    return {f"{layer}{name}.weight" for name in ("to_q", "to_k", "to_v", "to_out")}


def _convert(state_dict, heads, kv_heads, prefix, order):
    converted = dict(state_dict)
    layers = [key.removesuffix("to_q.weight") for key in state_dict if key.endswith("to_q.weight")]
    layers = [layer for layer in layers if layer.startswith(prefix) and _weights(layer) <= state_dict.keys()]
    if not layers:
        raise ValueError(f"state_dict has no MGQA ({', '.join(sorted(_weights(prefix)))})")
    for layer in layers:
        query, key, out = (state_dict[f"{layer}{name}.weight"] for name in ("to_q", "to_k", "to_out"))
        width = query.shape[0]
        fits = width % heads == 0 and key.shape[0] * heads == width * kv_heads and out.shape[1] == width
        if not fits:
            raise ValueError(
                f"{layer}to_q, to_k and to_out have weights of shape {tuple(query.shape)}, {tuple(key.shape)} and "
                f"{tuple(out.shape)}, which do not fit heads={heads}, kv_heads={kv_heads}"
            )
        features = torch.arange(width).view(heads, -1)[order].flatten()
        converted[f"{layer}to_q.weight"] = query[features.to(query.device)]
        converted[f"{layer}to_out.weight"] = out[:, features.to(out.device)]
    return converted
