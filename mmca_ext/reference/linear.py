"""Linear attention: Katharopoulos, Vyas, Pappas, Fleuret, "Transformers are RNNs", ICML 2020 (arXiv 2006.16236)."""

from typing import NamedTuple

import torch
from torch.overrides import is_tensor_like

from .inputs import autocast_inputs, check_key_mask, check_qkv, sequence_offsets, unpack, without_autocast, work_dtype
from .weights import clear_unseen, positions, products, repeat_kv, visible_by_order, weighted_values


class LinearState(NamedTuple):
    """What linear attention remembers of its keys, per KV head: S (B, Hkv, D, Dv), the sum of phi(k) v^T, and z
    (B, Hkv, D), that of phi(k). float64 as returned; float32 is taken too. Packed: (N, ...), one of each sequence.

    States of disjoint sets of keys add up: `LinearState(a.S + b.S, a.z + b.z)` is that of both.
    """

    S: torch.Tensor
    z: torch.Tensor


def phi(x):
    """elu(x) + 1 = exp(min(x, 0)) + max(x, 0), without cancellation for negative x; derivative: min(phi(x), 1)."""
    return torch.where(x > 0.0, x + 1.0, x.clamp(max=0.0).exp())


def _log_phi(x):
    return torch.where(x > 0.0, x.clamp(min=0.0).log1p(), x)


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
    unmasked keys j, j <= i + (Lk - Lq) if causal, and the keys in `state`: eq. 5 to 7 and 9 to 12 of the paper.

    Args:
        query: (B, Hq, Lq, D), or packed (Tq, Hq, D) with cu_seqlens_q and cu_seqlens_k; floating-point. Weights and
            outputs are computed in fp32 (fp64 for fp64), states in fp64.
        key, value: (B, Hkv, Lk, D) and (B, Hkv, Lk, Dv), or (Tk, Hkv, D) and (Tk, Hkv, Dv).
        is_causal: bottom-right aligned, as in `attention`.
        key_mask: boolean (B, Lk) or (Tk,), True = attend.
        state: LinearState of earlier keys, which every row sees.
        return_state: also return the state after this call's keys.

    Returns:
        out (B, Hq, Lq, Dv) or (Tq, Hq, Dv), 0 where a row sees nothing (or nothing but keys whose phi underflows); with
        return_state (out, LinearState), packed states have one entry per sequence.

    Raises:
        ValueError, TypeError: shapes, dtypes or values that do not fit.
    """
    query, key, value = autocast_inputs(query, key, value)
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    check_qkv(query, key, value, rank=3 if packed else 4)
    if not packed:
        state = _check_state(state, query.shape[0], key, value)
        if key_mask is not None:
            check_key_mask(key_mask, *key.shape[::2])
        out, state = _dense(query, key, value, is_causal, key_mask, state)
        return (out, state) if return_state else out

    if cu_seqlens_q is None or cu_seqlens_k is None or len(cu_seqlens_q) != len(cu_seqlens_k):
        raise ValueError("cu_seqlens_q and cu_seqlens_k go together and must have the same length")
    if key_mask is not None:
        check_key_mask(key_mask[None], 1, key.shape[0])
    q_offsets = sequence_offsets(cu_seqlens_q, query.shape[0], None, "cu_seqlens_q")
    k_offsets = sequence_offsets(cu_seqlens_k, key.shape[0], None, "cu_seqlens_k")
    sequences = len(q_offsets) - 1
    state = _check_state(state, sequences, key, value)
    out, states = query.new_zeros(query.shape[0], query.shape[1], value.shape[2]), []
    for n in range(sequences):
        q, k = (q_offsets[n], q_offsets[n + 1]), (k_offsets[n], k_offsets[n + 1])
        before = None if state is None else LinearState(state.S[n : n + 1], state.z[n : n + 1])
        mask = None if key_mask is None else key_mask[None, k[0] : k[1]]
        o, after = _dense(unpack(query, *q), unpack(key, *k), unpack(value, *k), is_causal, mask, before)
        out[q[0] : q[1]] = o[0].transpose(0, 1)
        states.append(after)
    if not return_state:
        return out
    S = query.new_zeros((0, key.shape[1], key.shape[2], value.shape[2]), dtype=torch.float64)
    z = query.new_zeros((0, key.shape[1], key.shape[2]), dtype=torch.float64)
    return out, LinearState(torch.cat([S, *(s.S for s in states)]), torch.cat([z, *(s.z for s in states)]))


def check_state(state):
    """(S, z), if it is a pair of tensors."""
    if not isinstance(state, tuple) or len(state) != 2 or not all(map(is_tensor_like, state)):
        raise TypeError(f"state must be a LinearState(S, z), got {type(state).__name__}")
    return state


def _check_state(state, batch, key, value):
    if state is None:
        return None
    S, z = check_state(state)
    heads, head_dim, value_dim = key.shape[1], key.shape[-1], value.shape[-1]
    if tuple(S.shape) != (batch, heads, head_dim, value_dim) or tuple(z.shape) != (batch, heads, head_dim):
        raise ValueError(
            f"state must be LinearState(S {(batch, heads, head_dim, value_dim)}, z {(batch, heads, head_dim)}), "
            f"got {tuple(S.shape)} and {tuple(z.shape)}"
        )
    for tensor in (S, z):
        if tensor.dtype not in (torch.float64, torch.float32):
            raise TypeError(f"state must be float64 or float32 tensors, got {tensor.dtype}")
    return LinearState(S, z)


@without_autocast
def _dense(query, key, value, is_causal, key_mask, state):
    batch, heads, q_len, _ = query.shape
    k_len, dtype, work = key.shape[2], query.dtype, work_dtype(query.dtype)
    query, key, value = query.to(work), key.to(work), value.to(work)
    visible = visible_by_order(positions(q_len, k_len, query.device), k_len, is_causal, (-1, -1))
    visible = visible.expand(batch, heads, q_len, k_len)
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
        key = key.masked_fill(~key_mask[:, None, :, None], 0.0)
        value = value.masked_fill(~key_mask[:, None, :, None], 0.0)
    phi_key = phi(key)
    if key_mask is not None:
        phi_key = phi_key.masked_fill(~key_mask[:, None, :, None], 0.0)
    S, z = phi_key.double().transpose(-1, -2) @ value.double(), phi_key.double().sum(-2)

    empty = ~visible.any(-1, keepdim=True)
    if state is not None:  # which all rows see
        empty = torch.zeros_like(empty)
    phi_keys, values = repeat_kv(phi_key, heads), repeat_kv(value, heads)
    query = query.masked_fill(empty, 0.0)
    _, phi_keys, values = clear_unseen(query, phi_keys, values, visible)
    log_phi = _log_phi(query)
    # phi(q_i) over its row maximum, which cancels: the quotient stays finite where phi(q_i) underflows.
    phi_query = (log_phi - log_phi.detach().amax(-1, keepdim=True)).exp()
    weights = products(phi_query, phi_keys, visible).masked_fill(~visible, 0.0)
    numerator, denominator = weighted_values(weights, values, visible), weights.sum(-1, keepdim=True)
    if state is not None:
        numerator = numerator + phi_query @ repeat_kv(state.S.to(work), heads)
        denominator = denominator + phi_query @ repeat_kv(state.z.to(work), heads).unsqueeze(-1)
        S, z = S + state.S.double(), z + state.z.double()
    # A row is empty by what it sees; where it sees keys whose phi underflows, there is no average either.
    nothing = denominator == 0
    out = (numerator / denominator.masked_fill(nothing, 1.0)).masked_fill(nothing, 0.0)
    return out.to(dtype), LinearState(S, z)
