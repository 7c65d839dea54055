"""Softmax attention, one key group."""

from functools import partial

import torch

from .inputs import (
    autocast_inputs,
    check_key_mask,
    check_qkv,
    check_scale,
    check_softcap,
    expand_mask,
    parse_window,
    sequence_offsets,
    unpack,
    without_autocast,
    work_dtype,
)
from .philox import _draw_rng_state, dropout_factor, dropout_threshold
from .weights import (
    clear_unseen,
    positions,
    repeat_kv,
    scores,
    softmax_and_lse,
    visible_by_order,
    weighted_values,
)


def attention(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    *,
    key_mask=None,
    window=None,
    softcap=None,
    generator=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    deterministic=False,
    return_lse=False,
    rng_state=None,
):
    """`mmca_ext.functional.attention` in plain PyTorch; see there. Causal is BOTTOM-RIGHT: j <= i + (Lk - Lq).

    Args:
        query: (B, Hq, Lq, D), or packed (Tq, Hq, D) with cu_seqlens_q and cu_seqlens_k.
        key: (B, Hkv, Lk, D) or (Tk, Hkv, D); Hq is a multiple of Hkv.
        value: (B, Hkv, Lk, Dv) or (Tk, Hkv, Dv).
        attn_mask: broadcastable to (B, Hq, Lq, Lk); boolean, True = attend, or float, added to the scores (-inf hides).
        dropout_p: probability of dropping an attention weight.
        is_causal: row i sees j <= i + (Lk - Lq).
        scale: factor on the scores, 1 / sqrt(D) by default.
        key_mask: boolean (B, Lk), True = attend.
        window: (left, right): row i at p = i + (Lk - Lq) sees p - left <= j <= p + right; None or -1 is unbounded.
        softcap: s = softcap * tanh(s / softcap), before the bias; None or 0 for none.
        generator: where the dropout seed is drawn from, unless rng_state is given.
        cu_seqlens_q, cu_seqlens_k: integer (N + 1,) offsets of N packed sequences.
        max_seqlen_q, max_seqlen_k: upper bounds on their lengths.
        deterministic: accepted; plain PyTorch follows `torch.use_deterministic_algorithms`.
        return_lse: also return the log-sum-exp of the scores, (B, Hq, Lq) or (Hq, Tq), differentiable.
        rng_state: int64 (2,) seed and offset of the dropout mask, see `dropout_mask`.

    Returns:
        out (B, Hq, Lq, Dv) or (Tq, Hq, Dv) in query's dtype; with return_lse (out, lse), lse fp32 (fp64 for fp64).
        Rows that see nothing are 0 with lse -inf.

    Raises:
        ValueError, TypeError: shapes, dtypes or values that do not fit.
    """
    query, key, value = autocast_inputs(query, key, value)
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    check_qkv(query, key, value, rank=3 if packed else 4)
    scale, softcap, window = check_scale(scale, query.shape[-1]), check_softcap(softcap), parse_window(window)
    if dropout_threshold(dropout_p) == 0:
        rng_state = None
    elif rng_state is None:
        rng_state = _draw_rng_state(generator)

    dense = partial(
        _dense,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        key_mask=key_mask,
        window=window,
        softcap=softcap,
        rng_state=rng_state,
    )
    if not packed:
        out, lse = dense(query, key, value)
        return (out, lse) if return_lse else out

    if cu_seqlens_q is None or cu_seqlens_k is None or len(cu_seqlens_q) != len(cu_seqlens_k):
        raise ValueError("cu_seqlens_q and cu_seqlens_k go together and must have the same length")
    if attn_mask is not None or key_mask is not None:
        raise ValueError("packed sequences take no attn_mask or key_mask: leave hidden tokens out of the sequences")
    q_offsets = sequence_offsets(cu_seqlens_q, query.shape[0], max_seqlen_q, "cu_seqlens_q")
    k_offsets = sequence_offsets(cu_seqlens_k, key.shape[0], max_seqlen_k, "cu_seqlens_k")
    out = query.new_zeros(query.shape[0], query.shape[1], value.shape[2])
    lse = query.new_full((query.shape[1], query.shape[0]), -torch.inf, dtype=work_dtype(query.dtype))
    for n in range(len(q_offsets) - 1):
        q, k = (q_offsets[n], q_offsets[n + 1]), (k_offsets[n], k_offsets[n + 1])
        o, s = dense(unpack(query, *q), unpack(key, *k), unpack(value, *k), first_batch=n)
        out[q[0] : q[1]] = o[0].transpose(0, 1)
        lse[:, q[0] : q[1]] = s[0]
    return (out, lse) if return_lse else out


@without_autocast
def _dense(
    query, key, value, attn_mask, dropout_p, is_causal, scale, key_mask, window, softcap, rng_state, first_batch=0
):
    batch, heads, q_len, _ = query.shape
    k_len, dtype, work = key.shape[2], query.dtype, work_dtype(query.dtype)
    shape = (batch, heads, q_len, k_len)
    rows = positions(q_len, k_len, query.device)

    visible, bias = visible_by_order(rows, k_len, is_causal, window).expand(shape), None
    if attn_mask is not None:
        attn_mask = expand_mask(attn_mask, shape)
        if attn_mask.dtype == torch.bool:
            visible = visible & attn_mask
        else:
            bias = attn_mask.to(work)
            visible = visible & (attn_mask != -torch.inf)
    if key_mask is not None:
        check_key_mask(key_mask, batch, k_len)
        visible = visible & key_mask[:, None, None, :]

    query, key, value = query.to(work), repeat_kv(key.to(work), heads), repeat_kv(value.to(work), heads)
    query, key, value = clear_unseen(query, key, value, visible)
    weights, lse = softmax_and_lse(scores(query, key, visible, scale, softcap, bias), visible)
    if rng_state is not None:
        batches = torch.arange(batch, device=query.device) + first_batch
        weights = weights * dropout_factor(batches, heads, rows, k_len, dropout_p, rng_state, work)
    out = weighted_values(weights, value, visible).masked_fill(~visible.any(-1, keepdim=True), 0.0)
    return out.to(dtype), lse
