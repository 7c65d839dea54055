"""Scores, softmax and weighted sums in which a hidden key takes no part: neither its value nor a NaN in it, neither in
the result nor in a gradient. Tensors are (B, H, L, D), `visible` is a full boolean (B, H, Lq, Lk)."""

import torch


def repeat_kv(tensor, heads):
    """KV head g serves the query heads h with h // (Hq / Hkv) == g (arXiv 2305.13245)."""
    return tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


def positions(q_len, k_len, device):
    """p_i = i + (Lk - Lq): the last query row stands at the last key."""
    return torch.arange(q_len, device=device) + (k_len - q_len)


def visible_by_order(rows, k_len, is_causal, window):
    """Boolean (Lq, Lk): j <= p_i if causal, p_i - left <= j <= p_i + right; `rows` holds the p_i."""
    left, right = window
    distance = torch.arange(k_len, device=rows.device) - rows.unsqueeze(-1)
    visible = torch.ones_like(distance, dtype=torch.bool)
    if is_causal:
        visible = visible & (distance <= 0)
    if left >= 0:
        visible = visible & (distance >= -left)
    if right >= 0:
        visible = visible & (distance <= right)
    return visible


def clear_unseen(query, key, value, visible):
    """Zeros for queries that see nothing and for keys and values that nobody sees: 0 * NaN never arises from them."""
    unseen = ~visible.any(-2).unsqueeze(-1)
    query = query.masked_fill(~visible.any(-1).unsqueeze(-1), 0.0)
    return query, key.masked_fill(unseen, 0.0), value.masked_fill(unseen, 0.0)


def _all_finite(*tensors):
    # A compiled graph cannot branch on values: there, a NaN hidden from some rows only may spread to those rows.
    return torch.compiler.is_compiling() or all(bool(t.isfinite().all()) for t in tensors)


def products(query, key, visible):
    """<q_i, k_j>, (B, H, Lq, Lk), meaningful where visible."""
    if _all_finite(query, key):
        return query @ key.transpose(-1, -2)
    hidden = ~visible.unsqueeze(-1)  # one product at a time, so that hidden pairs are absent: O(Lq Lk D) memory
    return (query.unsqueeze(-2).masked_fill(hidden, 0.0) * key.unsqueeze(-3).masked_fill(hidden, 0.0)).sum(-1)


def weighted_values(weights, value, visible):
    """sum_j weights[i,j] v_j over the visible j; the weights are 0 where hidden."""
    if _all_finite(value):
        return weights @ value
    return (weights.unsqueeze(-1) * value.unsqueeze(-3).masked_fill(~visible.unsqueeze(-1), 0.0)).sum(-2)


def scores(query, key, visible, scale, softcap=None, bias=None):
    """s[i,j] = softcap * tanh(t / softcap) + bias with t = scale <q_i, k_j>; -inf where hidden."""
    s = scale * products(query, key, visible)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias
    return s.masked_fill(~visible, -torch.inf)


def softmax_and_lse(s, visible):
    """Softmax over the visible keys and its log-sum-exp; an empty row has weights 0 and lse -inf, gradients 0."""
    empty = ~visible.any(-1)
    s = s.masked_fill(~visible, -torch.inf).masked_fill(empty.unsqueeze(-1), 0.0)  # keep -inf - -inf out of autograd
    weights = s.softmax(-1).masked_fill(~visible, 0.0)
    if not s.shape[-1]:
        return weights, s.logsumexp(-1)
    # Not torch's logsumexp, whose gradient exp(s - lse) is n times too large where lse swallows log n (finfo.min).
    largest = s.detach().amax(-1, keepdim=True)
    largest = largest.masked_fill(largest.isinf(), 0.0)
    lse = largest.squeeze(-1) + (s - largest).exp().sum(-1).log()
    return weights, lse.masked_fill(empty, -torch.inf)
