"""Working with the log-sum-exp: merging partial results and looking at chosen rows of the weights."""

import torch

from .inputs import check_key_mask, check_scale, check_softcap, expand_mask, parse_window, work_dtype
from .mmca import IMAGE_ROWS, _check_modality, visible_groups
from .weights import positions, repeat_kv, scores, visible_by_order


def merge_attention(outputs, lses):
    """Merge partial results of one softmax over disjoint key sets into the result over their union.

    LSE = logsumexp_r lse_r, out = sum_r exp(lse_r - LSE) O_r: the combination step of FlashAttention's split keys and
    of ring attention (arXiv 2310.01889). Differentiable in both arguments; the lse of a partial result has a gradient.

    Args:
        outputs: (R, ..., D), or a list of R tensors (..., D): normalised partial outputs.
        lses: (R, ...), or a list of R tensors (...): their log-sum-exp, natural logarithm; -inf for an empty set,
            whose output is ignored.

    Returns:
        (output (..., D) in outputs' dtype, lse (...) in lses' dtype); 0 and -inf where every part is empty.

    Raises:
        ValueError: shapes do not fit.
    """
    if isinstance(outputs, (list, tuple)):
        outputs = torch.stack(tuple(outputs))
    if isinstance(lses, (list, tuple)):
        lses = torch.stack(tuple(lses))
    if outputs.dim() < 1 or outputs.shape[:-1] != lses.shape:
        raise ValueError(
            f"outputs (R, ..., D) and lses (R, ...) do not fit: {tuple(outputs.shape)}, {tuple(lses.shape)}"
        )
    work = work_dtype(torch.promote_types(outputs.dtype, lses.dtype))
    absent = lses == -torch.inf
    empty = absent.all(0)
    levels = lses.to(work).masked_fill(empty, 0.0)  # keep -inf - -inf out of autograd
    weights = levels.softmax(0).masked_fill(absent, 0.0).unsqueeze(-1)
    out = (weights * outputs.to(work).masked_fill(absent.unsqueeze(-1), 0.0)).sum(0)
    return out.to(outputs.dtype), levels.logsumexp(0).masked_fill(empty, -torch.inf).to(lses.dtype)


def attention_map(
    query,
    key,
    lse,
    *,
    rows=None,
    is_causal=False,
    attn_mask=None,
    key_mask=None,
    modality=None,
    image_rows="self",
    scale=None,
    window=None,
    softcap=None,
    image_id=None,
):
    """The exact attention weights of chosen rows, exp(s[i,j] - lse[i]), from the LSE of an earlier call.

    Costs O(rows * Lk); nothing of size Lq x Lk is made unless all rows are asked for. The weights are those before
    dropout. Bottom-right causal, as everywhere.

    Args:
        query, key: (B, Hq, Lq, D) and (B, Hkv, Lk, D), as in the call that returned lse.
        lse: (B, Hq, Lq); with modality the groups' (2, B, Hq, Lq), which gives each key the weight it has in its own
            group's softmax, or a joint (B, Hq, Lq) (for merge="lse": `torch.logsumexp(lse, 0)`).
        rows: which query rows: None for all, an integer, a list or a 1-D integer tensor; negative counts from the end.
        is_causal, attn_mask, key_mask, modality, image_rows, scale, window, softcap, image_id: as in that call. What
            differs from it makes the weights wrong.

    Returns:
        (B, Hq, R, Lk) in fp32 (fp64 for fp64), 0 where hidden.

    Raises:
        ValueError, TypeError: shapes, dtypes or values that do not fit.
    """
    batch, heads, q_len, head_dim = query.shape
    k_len, work = key.shape[2], work_dtype(query.dtype)
    if heads % key.shape[1]:
        raise ValueError(f"query heads must be a multiple of key/value heads, got {heads} and {key.shape[1]}")
    shape = (batch, heads, q_len)
    if lse.shape != shape and (modality is None or lse.shape != (2, *shape)):
        raise ValueError(f"lse must be (B, Hq, Lq) = {shape}, or (2, B, Hq, Lq) with modality, got {tuple(lse.shape)}")
    index = _row_index(rows, q_len, query.device)
    query, lse = query.to(work)[:, :, index], lse.to(work)[..., index]
    place, shape = positions(q_len, k_len, query.device)[index], (batch, heads, len(index), k_len)
    bias = None
    if image_id is not None and modality is None:
        raise ValueError("image_id belongs to modality")
    if modality is None:
        visible = visible_by_order(place, k_len, is_causal, parse_window(window)).expand(shape)
    else:
        if is_causal or window is not None:
            raise ValueError("is_causal and window do not go with modality, whose rule is causal where it has to be")
        if image_rows not in IMAGE_ROWS:
            raise ValueError(f"image_rows must be one of {IMAGE_ROWS}, got {image_rows!r}")
        if q_len > k_len:
            raise ValueError(f"queries are the last Lq of the Lk tokens, got Lq = {q_len} > Lk = {k_len}")
        _check_modality(modality, image_id, (batch, k_len))
        text, image, _ = visible_groups(modality, place, image_rows, image_id)
        visible = (text | image).unsqueeze(1).expand(shape)
    if attn_mask is not None:
        attn_mask = expand_mask(attn_mask, (batch, heads, q_len, k_len))[:, :, index]
        if attn_mask.dtype == torch.bool:
            visible = visible & attn_mask
        else:
            visible, bias = visible & (attn_mask != -torch.inf), attn_mask.to(work)
    if key_mask is not None:
        check_key_mask(key_mask, batch, k_len)
        visible = visible & key_mask[:, None, None, :]

    key = repeat_kv(key.to(work), heads)
    key = key.masked_fill(~visible.any(-2).unsqueeze(-1), 0.0)
    if lse.dim() == 4:
        level = torch.where((modality >= 2)[:, None, None, :], lse[1].unsqueeze(-1), lse[0].unsqueeze(-1))
    else:
        level = lse.unsqueeze(-1)
    level = level.masked_fill(level == -torch.inf, 0.0)
    s = scores(query, key, visible, check_scale(scale, head_dim), check_softcap(softcap), bias)
    return (s - level).exp()


def _row_index(rows, q_len, device):
    index = torch.arange(q_len, device=device)
    if rows is None:
        return index
    rows = torch.as_tensor(rows, device=device).reshape(-1)
    if rows.is_floating_point() or rows.dtype == torch.bool:
        raise TypeError(f"rows must be integers, got {rows.dtype}")
    if bool(((rows < -q_len) | (rows >= q_len)).any()):
        raise ValueError(f"rows must be within the {q_len} query rows, got {rows.tolist()}")
    return index[rows]
