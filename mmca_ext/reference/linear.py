"""Linear attention: Katharopoulos, Vyas, Pappas, Fleuret, "Transformers are RNNs", ICML 2020 (arXiv 2006.16236)."""

from typing import NamedTuple

import torch

from .inputs import autocast_inputs, check_key_mask, check_qkv, sequence_offsets, unpack, without_autocast, work_dtype
from .weights import clear_unseen, positions, products, repeat_kv, visible_by_order, weighted_values


class LinearState(NamedTuple):
    """What linear attention remembers of its keys: S (B, Hkv, D, Dv), sum of phi(k) v^T; z (B, Hkv, D), of phi(k)."""

    S: torch.Tensor
    z: torch.Tensor


def phi(x):
    """elu(x) + 1 as exp(min(x, 0)) + max(x, 0): no cancellation for negative x."""
    return x.clamp(max=0.0).exp() + x.clamp(min=0.0)


def _log_phi(x):
    return x.clamp(max=0.0) + x.clamp(min=0.0).log1p()


def linear_attention(
    query,
    key,
    value,
    is_causal=False,
    *,
    key_mask=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    state=None,
    return_state=False,
):
    """`mmca_ext.functional.linear_attention` in plain PyTorch (quadratic here: the weights are materialised).

    out_i = phi(q_i) . S_i / (phi(q_i) . z_i), S_i = sum_j phi(k_j) v_j^T, z_i = sum_j phi(k_j), phi = elu + 1, over the
    unmasked keys j, j <= i + (Lk - Lq) if causal, and the keys in `state`.

    Args:
        query: (B, Hq, Lq, D), or packed (Tq, Hq, D) with cu_seqlens_q and cu_seqlens_k.
        key, value: (B, Hkv, Lk, D) and (B, Hkv, Lk, Dv), or (Tk, Hkv, D) and (Tk, Hkv, Dv).
        is_causal: bottom-right aligned, as in `attention`.
        key_mask: boolean (B, Lk), True = attend.
        state: LinearState of earlier keys, which every row sees.
        return_state: also return the state after this call's keys, in fp32 (fp64 for fp64).

    Returns:
        out (B, Hq, Lq, Dv) or (Tq, Hq, Dv), 0 where a row sees nothing; with return_state (out, LinearState), packed
        states have one entry per sequence.

    Raises:
        ValueError, TypeError: shapes, dtypes or values that do not fit.
    """
    query, key, value = autocast_inputs(query, key, value)
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    check_qkv(query, key, value, rank=3 if packed else 4)
    if not packed:
        _check_state(state, query.shape[0], key, value)
        out, state = _dense(query, key, value, is_causal, key_mask, state)
        return (out, state) if return_state else out

    if cu_seqlens_q is None or cu_seqlens_k is None or len(cu_seqlens_q) != len(cu_seqlens_k):
        raise ValueError("cu_seqlens_q and cu_seqlens_k go together and must have the same length")
    if key_mask is not None:
        raise ValueError("packed sequences take no key_mask: leave hidden tokens out of the sequences")
    q_offsets = sequence_offsets(cu_seqlens_q, query.shape[0], None, "cu_seqlens_q")
    k_offsets = sequence_offsets(cu_seqlens_k, key.shape[0], None, "cu_seqlens_k")
    sequences = len(q_offsets) - 1
    _check_state(state, sequences, key, value)
    out, states = query.new_zeros(query.shape[0], query.shape[1], value.shape[2]), []
    for n in range(sequences):
        q, k = (q_offsets[n], q_offsets[n + 1]), (k_offsets[n], k_offsets[n + 1])
        before = None if state is None else LinearState(state.S[n : n + 1], state.z[n : n + 1])
        o, after = _dense(unpack(query, *q), unpack(key, *k), unpack(value, *k), is_causal, None, before)
        out[q[0] : q[1]] = o[0].transpose(0, 1)
        states.append(after)
    if not return_state:
        return out
    S = query.new_zeros((0, key.shape[1], key.shape[2], value.shape[2]), dtype=work_dtype(query.dtype))
    z = query.new_zeros((0, key.shape[1], key.shape[2]), dtype=work_dtype(query.dtype))
    return out, LinearState(torch.cat([S, *(s.S for s in states)]), torch.cat([z, *(s.z for s in states)]))


def _check_state(state, batch, key, value):
    if state is None:
        return
    heads, head_dim, value_dim = key.shape[1], key.shape[-1], value.shape[-1]
    S, z = state
    if tuple(S.shape) != (batch, heads, head_dim, value_dim) or tuple(z.shape) != (batch, heads, head_dim):
        raise ValueError(
            f"state must be LinearState(S {(batch, heads, head_dim, value_dim)}, z {(batch, heads, head_dim)}), "
            f"got {tuple(S.shape)} and {tuple(z.shape)}"
        )


@without_autocast
def _dense(query, key, value, is_causal, key_mask, state):
    batch, heads, q_len, _ = query.shape
    k_len, dtype, work = key.shape[2], query.dtype, work_dtype(query.dtype)
    query, key, value = query.to(work), key.to(work), value.to(work)
    visible = visible_by_order(positions(q_len, k_len, query.device), k_len, is_causal, (-1, -1))
    visible = visible.expand(batch, heads, q_len, k_len)
    if key_mask is not None:
        check_key_mask(key_mask, batch, k_len)
        visible = visible & key_mask[:, None, None, :]
        key = key.masked_fill(~key_mask[:, None, :, None], 0.0)
        value = value.masked_fill(~key_mask[:, None, :, None], 0.0)
    phi_key = phi(key)
    if key_mask is not None:
        phi_key = phi_key.masked_fill(~key_mask[:, None, :, None], 0.0)

    seen = visible if state is None else torch.ones_like(visible[..., :1])  # a state may be all a row sees
    phi_keys, values = repeat_kv(phi_key, heads), repeat_kv(value, heads)
    query = query.masked_fill(~seen.any(-1, keepdim=True), 0.0)
    _, phi_keys, values = clear_unseen(query, phi_keys, values, visible)
    log_phi = _log_phi(query)
    # phi(q_i) over its row maximum, which cancels: the quotient stays finite where phi(q_i) underflows.
    phi_query = (log_phi - log_phi.detach().amax(-1, keepdim=True)).exp()
    weights = products(phi_query, phi_keys, visible).masked_fill(~visible, 0.0)
    numerator, denominator = weighted_values(weights, values, visible), weights.sum(-1, keepdim=True)
    if state is not None:
        numerator = numerator + phi_query @ repeat_kv(state.S.to(work), heads)
        denominator = denominator + phi_query @ repeat_kv(state.z.to(work), heads).unsqueeze(-1)
    nothing = denominator == 0  # no key, or keys whose phi underflows
    out = (numerator / denominator.masked_fill(nothing, 1.0)).masked_fill(nothing, 0.0)

    S, z = phi_key.transpose(-1, -2) @ value, phi_key.sum(-2)
    if state is not None:
        S, z = S + state.S.to(work), z + state.z.to(work)
    return out.to(dtype), LinearState(S, z)
