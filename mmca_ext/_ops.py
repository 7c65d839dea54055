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


def _check_devices(query, *tensors):
    """The dispatcher takes the fake path for one meta tensor among real ones; nothing may come of such a call."""
    for tensor in tensors:
        if tensor is not None and tensor.device != query.device:
            raise ValueError(f"mmca_ext: all tensors must be on query's device {query.device}, got {tensor.device}")


def _results(query, value, groups, save_for_backward):
    batch, heads, q_len, _ = query.shape
    dtype = _statistics_dtype(query.dtype)
    shape = (*groups, batch, heads, q_len)
    lse = query.new_empty(shape, dtype=dtype)
    lse_low = query.new_empty(shape if save_for_backward else (0,), dtype=dtype)
    return _laid_out_like(query, value.shape[3]), lse, lse_low


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
    save_for_backward,
):
    _check_devices(query, key, value, attn_mask, key_mask)
    return _results(query, value, (), save_for_backward)


@torch.library.register_fake("mmca_ext::attention_backward")
def _(
    grad_out,
    grad_lse,
    query,
    key,
    value,
    out,
    lse,
    lse_low,
    attn_mask,
    key_mask,
    rng_state,
    scale,
    is_causal,
    window_left,
    window_right,
    dropout_p,
):
    _check_devices(query, grad_out, grad_lse, key, value, out, lse, lse_low, attn_mask, key_mask)
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
    save_for_backward,
):
    _check_devices(query, key, value, modality, image_id)
    out, lse, lse_low = _results(query, value, (2,), save_for_backward)
    separate = save_for_backward and merge != "lse"
    group_out = lse.new_empty((*lse.shape, value.shape[3]) if separate else (0,))
    return out, lse, lse_low, group_out


@torch.library.register_fake("mmca_ext::mmca_attention_backward")
def _(
    grad_out,
    grad_lse,
    query,
    key,
    value,
    out,
    lse,
    lse_low,
    group_out,
    modality,
    image_id,
    rng_state,
    image_rows,
    merge,
    scale,
    dropout_p,
):
    _check_devices(query, grad_out, grad_lse, key, value, out, lse, lse_low, group_out, modality, image_id)
    return _gradients(query, key, value)
