"""Fake implementations of the compiled operators: shapes, dtypes and strides for torch.compile and torch.export.

Memory layout, the same rule as in the operators: a (B, H, L, D) result lies in memory as (B, L, H, D) when its tensor
has heads inside rows (stride(1) < stride(2), what a projection's view gives), else as (B, H, L, D). `out` follows
query, each gradient its own tensor.
"""

import torch


def _laid_out_like(like, value_dim):
    """An empty (B, H, L, value_dim) tensor of like's B, H, L, dtype and layout."""
    batch, heads, length, _ = like.shape
    if like.stride(1) < like.stride(2):
        return like.new_empty(batch, length, heads, value_dim).transpose(1, 2)
    return like.new_empty(batch, heads, length, value_dim)


def _statistics_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _gradients(query, key, value):
    return tuple(_laid_out_like(tensor, tensor.shape[3]) for tensor in (query, key, value))


@torch.library.register_fake("mmca_ext::attention")
def _(
    query,
    key,
    value,
    attn_mask,
    key_mask,
    rng_state,
    scale,
    is_causal,
    window_left,
    window_right,
    dropout_p,
):
    lse = query.new_empty(query.shape[:3], dtype=_statistics_dtype(query.dtype))
    return _laid_out_like(query, value.shape[3]), lse


@torch.library.register_fake("mmca_ext::attention_backward")
def _(
    grad_out,
    grad_lse,
    query,
    key,
    value,
    out,
    lse,
    attn_mask,
    key_mask,
    rng_state,
    scale,
    is_causal,
    window_left,
    window_right,
    dropout_p,
):
    return _gradients(query, key, value)


@torch.library.register_fake("mmca_ext::mmca_attention")
def _(
    query,
    key,
    value,
    modality,
    image_id,
    rng_state,
    image_rows,
    merge,
    scale,
    dropout_p,
    save_group_out,
):
    batch, heads, q_len, _ = query.shape
    value_dim, dtype = value.shape[3], _statistics_dtype(query.dtype)
    lse = query.new_empty((2, batch, heads, q_len), dtype=dtype)
    group_out = query.new_empty((2, batch, heads, q_len, value_dim) if save_group_out else (0,), dtype=dtype)
    return _laid_out_like(query, value_dim), lse, group_out


@torch.library.register_fake("mmca_ext::mmca_attention_backward")
def _(
    grad_out,
    grad_lse,
    query,
    key,
    value,
    out,
    lse,
    group_out,
    modality,
    image_id,
    rng_state,
    image_rows,
    merge,
    scale,
    dropout_p,
):
    return _gradients(query, key, value)
