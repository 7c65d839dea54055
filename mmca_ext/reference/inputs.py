"""Argument checks and conversions that the reference functions share."""

import math
from functools import wraps
from itertools import pairwise

import torch


def work_dtype(dtype):
    """The type of scores, softmax and sums: fp64 for fp64 input, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_inputs(*tensors):
    """Under autocast, all but fp64 becomes autocast's dtype, as in the operators."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def without_autocast(function):
    """Run function(query, ...) in the dtypes that it chooses itself."""

    @wraps(function)
    def run(query, *args, **kwargs):
        with torch.autocast(query.device.type, enabled=False):
            return function(query, *args, **kwargs)

    return run


def check_qkv(query, key, value, rank):
    """Shapes (B, H, L, D), rank 4, or packed (T, H, D), rank 3; Hq a multiple of Hkv; one float dtype, one device."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != rank:
            shape = "(B, H, L, D)" if rank == 4 else "(T, H, D) with cu_seqlens"
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} must have query's dtype {query.dtype}, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on query's device {query.device}, got {tensor.device}")
    head, length = (1, 2) if rank == 4 else (1, 0)
    if rank == 4 and not query.shape[0] == key.shape[0] == value.shape[0]:
        raise ValueError(f"query, key and value differ in batch: {query.shape[0]}, {key.shape[0]}, {value.shape[0]}")
    if key.shape[head] != value.shape[head] or key.shape[length] != value.shape[length]:
        raise ValueError(f"key and value differ in heads or length: {tuple(key.shape)}, {tuple(value.shape)}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query and key differ in head_dim: {query.shape[-1]}, {key.shape[-1]}")
    heads, kv_heads = query.shape[head], key.shape[head]
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"query heads must be a positive multiple of key/value heads, got {heads} and {kv_heads}")


def check_scale(scale, head_dim):
    """The scale as a number; 1 / sqrt(head_dim) by default."""
    if scale is None:
        return head_dim**-0.5
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    return scale


def check_softcap(softcap):
    """The soft cap, or None when there is none (None or 0)."""
    if softcap is None or softcap == 0:
        return None
    if not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap must be positive and finite, got {softcap}")
    return softcap


def parse_window(window):
    """(left, right) with -1 for unbounded."""
    if window is None:
        return -1, -1
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(f"window must be a pair (left, right) or None, got {window!r}")
    sides = []
    for side in window:
        if side is None:
            side = -1
        elif isinstance(side, bool) or not isinstance(side, (int, torch.SymInt)):
            raise TypeError(f"window must hold integers or None, got {window!r}")
        elif side < -1:
            raise ValueError(f"window must hold non-negative integers, -1 or None (unbounded), got {window!r}")
        sides.append(side)
    return tuple(sides)


def check_key_mask(key_mask, batch, k_len):
    if key_mask.dtype != torch.bool:
        raise TypeError(f"key_mask must be boolean (True: attend), got {key_mask.dtype}")
    if tuple(key_mask.shape) != (batch, k_len):
        raise ValueError(f"key_mask must have shape (B, Lk) = ({batch}, {k_len}), got {tuple(key_mask.shape)}")


def expand_mask(attn_mask, shape):
    """attn_mask as (B, Hq, Lq, Lk), by broadcasting."""
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(f"attn_mask must be boolean (True: attend) or floating point (added), got {attn_mask.dtype}")
    try:
        return attn_mask.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"attn_mask must be broadcastable to (B, Hq, Lq, Lk) = {tuple(shape)}, got {tuple(attn_mask.shape)}"
        ) from None


def sequence_offsets(cu_seqlens, tokens, max_seqlen, name):
    """The offsets as Python integers, validated: 0 = c[0] <= c[1] <= ... <= tokens."""
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name} must be a 1-D int32 or int64 tensor of offsets, got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] > tokens or any(a > b for a, b in pairwise(offsets)):
        raise ValueError(f"{name} must start at 0, never decrease and end at most at {tokens}, got {offsets}")
    longest = max((b - a for a, b in pairwise(offsets)), default=0)
    if max_seqlen is not None and max_seqlen < longest:
        raise ValueError(f"the longest sequence of {name} has {longest} tokens, more than max_seqlen {max_seqlen}")
    return offsets


def unpack(tensor, begin, end):
    """Tokens begin..end of a packed (T, H, D) tensor as a batch of one, (1, H, L, D)."""
    return tensor[begin:end].transpose(0, 1).unsqueeze(0)
