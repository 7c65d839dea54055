"""Multi-modal causal attention: two key groups, text and image, each with its own softmax (arXiv 2309.14327)."""

from functools import partial

import torch
import torch.nn.functional as F

from .inputs import (
    autocast_inputs,
    check_qkv,
    check_scale,
    check_softcap,
    sequence_offsets,
    unpack,
    without_autocast,
    work_dtype,
)
from .philox import _draw_rng_state, dropout_factor, dropout_threshold
from .weights import clear_unseen, positions, repeat_kv, scores, softmax_and_lse, weighted_values

IMAGE_ROWS = ("self", "block", "causal", "self+text")
MERGES = ("sum", "lse", "gate", "none")


def mmca_attention(
    query,
    key,
    value,
    modality,
    *,
    image_rows="self",
    merge="sum",
    gate=None,
    image_id=None,
    dropout_p=0.0,
    scale=None,
    softcap=None,
    generator=None,
    cu_seqlens=None,
    max_seqlen=None,
    deterministic=False,
    return_lse=False,
    rng_state=None,
):
    """`mmca_ext.functional.mmca_attention` in plain PyTorch; see there.

    Args:
        query: (B, Hq, Lq, D), the last Lq tokens of the sequence; or packed (T, Hq, D) with cu_seqlens.
        key, value: (B, Hkv, Lk, D) and (B, Hkv, Lk, Dv), or (T, Hkv, D) and (T, Hkv, Dv).
        modality: integers (B, Lk) or (T,): 0 padding, 1 text, 2 and above non-text ("image").
        image_rows: what an image row sees: "self", "block", "causal" or "self+text".
        merge: "sum", "lse" (one joint softmax), "gate" (weighted sum) or "none".
        gate: float weights of the groups, broadcastable to (B, Hq, Lq, 2), or (T, Hq, 2); only with merge="gate".
        image_id: integers like modality; under "block" an image is a run of image tokens with one image_id.
        dropout_p, scale, softcap, generator, deterministic, rng_state: as in `attention`. The key an image row shares
            with itself under "self" and "self+text" is not dropped.
        cu_seqlens, max_seqlen: offsets of packed sequences and an upper bound on their lengths.
        return_lse: also return the groups' log-sum-exp (2, B, Hq, Lq) or (2, Hq, T): text, image.

    Returns:
        out (B, Hq, Lq, Dv) or (T, Hq, Dv), with return_lse (out, lse); for merge="none" always (O, lse) with
        O (2, B, Hq, Lq, Dv) or (2, T, Hq, Dv).

    Raises:
        ValueError, TypeError: shapes, dtypes or values that do not fit.
    """
    query, key, value = autocast_inputs(query, key, value)
    packed = cu_seqlens is not None
    check_qkv(query, key, value, rank=3 if packed else 4)
    if image_rows not in IMAGE_ROWS:
        raise ValueError(f"image_rows must be one of {IMAGE_ROWS}, got {image_rows!r}")
    if merge not in MERGES:
        raise ValueError(f"merge must be one of {MERGES}, got {merge!r}")
    if (gate is None) == (merge == "gate"):
        given = "no gate" if gate is None else "a gate"
        raise ValueError(f'gate goes with merge="gate" and only with it, got merge={merge!r} and {given}')
    scale, softcap = check_scale(scale, query.shape[-1]), check_softcap(softcap)
    q_len, k_len = (query.shape[0], key.shape[0]) if packed else (query.shape[2], key.shape[2])
    if q_len > k_len:
        raise ValueError(f"queries are the last Lq of the Lk tokens, got Lq = {q_len} > Lk = {k_len}")
    _check_modality(modality, image_id, (k_len,) if packed else (key.shape[0], k_len))
    if dropout_threshold(dropout_p) == 0:
        rng_state = None
    elif rng_state is None:
        rng_state = _draw_rng_state(generator)

    dense = partial(
        _dense,
        image_rows=image_rows,
        merge=merge,
        dropout_p=dropout_p,
        scale=scale,
        softcap=softcap,
        rng_state=rng_state,
    )
    if not packed:
        if gate is not None:
            gate = _expand_gate(gate, (*query.shape[:3], 2))
        out, lse = dense(query, key, value, modality, image_id, gate)
        return (out, lse) if return_lse or merge == "none" else out

    tokens, heads, value_dim = query.shape[0], query.shape[1], value.shape[2]
    if key.shape[0] != tokens:
        raise ValueError(f"packed query and key must have the same tokens, got {tokens} and {key.shape[0]}")
    if gate is not None:
        gate = _expand_gate(gate, (tokens, heads, 2))
    offsets = sequence_offsets(cu_seqlens, tokens, max_seqlen, "cu_seqlens")
    out = query.new_zeros((2, tokens, heads, value_dim) if merge == "none" else (tokens, heads, value_dim))
    lse = query.new_full((2, heads, tokens), -torch.inf, dtype=work_dtype(query.dtype))
    for n in range(len(offsets) - 1):
        begin, end = offsets[n], offsets[n + 1]
        ids = None if image_id is None else image_id[None, begin:end]
        gates = None if gate is None else unpack(gate, begin, end)
        qkv = (unpack(t, begin, end) for t in (query, key, value))
        o, s = dense(*qkv, modality[None, begin:end], ids, gates, first_batch=n)
        out[..., begin:end, :, :] = o.squeeze(-4).transpose(-3, -2)
        lse[:, :, begin:end] = s[:, 0]
    return (out, lse) if return_lse or merge == "none" else out


def _check_modality(modality, image_id, shape):
    for name, tensor in (("modality", modality), ("image_id", image_id)):
        if tensor is None:
            continue
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"{name} must be an integer tensor, got {tensor.dtype}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if not torch.compiler.is_compiling() and bool((modality < 0).any()):
        raise ValueError(f"modality must be 0 (padding), 1 (text) or more (image), got {int(modality.min())}")


def _expand_gate(gate, shape):
    if not gate.is_floating_point():
        raise TypeError(f"gate must be a floating-point tensor, got {gate.dtype}")
    try:
        return gate.expand(shape)
    except RuntimeError:
        raise ValueError(f"gate must be broadcastable to {tuple(shape)}, got {tuple(gate.shape)}") from None


def runs(modality, image_id=None):
    """Number the maximal runs of neighbouring image tokens with one id, (B, L); other tokens are runs of their own."""
    ids, image = modality if image_id is None else image_id, modality >= 2
    joined = image[:, 1:] & image[:, :-1] & (ids[:, 1:] == ids[:, :-1])
    return F.pad((~joined).cumsum(-1), (1, 0))[:, : modality.shape[1]]


def visible_groups(modality, rows, image_rows, image_id=None):
    """What each row sees of the text and of the image group.

    modality is (B, Lk) and rows (Lq,) the rows' positions. Returns two booleans (B, Lq, Lk), text and image, and `own`
    (B, Lq, Lk), True at (i, p_i) where the image row i is its whole image group.
    """
    k_len = modality.shape[1]
    j, p = torch.arange(k_len, device=rows.device), rows.unsqueeze(-1)
    row_kind = modality[:, rows].unsqueeze(-1)
    text_row, image_row = row_kind == 1, row_kind >= 2
    text_key, image_key = (modality == 1).unsqueeze(1), (modality >= 2).unsqueeze(1)
    earlier, own = j <= p, (j == p) & image_row

    text, image = text_row & text_key & earlier, text_row & image_key & earlier
    if image_rows == "causal":
        return text | (image_row & text_key & earlier), image | (image_row & image_key & earlier), torch.zeros_like(own)
    if image_rows == "block":
        run = runs(modality, image_id)
        same_image = run[:, rows].unsqueeze(-1) == run.unsqueeze(1)
        return text, image | (image_row & image_key & same_image), torch.zeros_like(own)
    if image_rows == "self+text":
        text = text | (image_row & text_key & earlier)
    return text, image | own, own


@without_autocast
def _dense(
    query,
    key,
    value,
    modality,
    image_id,
    gate,
    *,
    image_rows,
    merge,
    dropout_p,
    scale,
    softcap,
    rng_state,
    first_batch=0,
):
    batch, heads, q_len, _ = query.shape
    k_len, dtype, work = key.shape[2], query.dtype, work_dtype(query.dtype)
    rows = positions(q_len, k_len, query.device)
    groups = visible_groups(modality, rows, image_rows, image_id)
    text, image, own = (g.unsqueeze(1).expand(batch, heads, q_len, k_len) for g in groups)
    union = text | image

    query, key, value = query.to(work), repeat_kv(key.to(work), heads), repeat_kv(value.to(work), heads)
    query, key, value = clear_unseen(query, key, value, union)
    s = scores(query, key, union, scale, softcap)
    factor = None
    if rng_state is not None:
        batches = torch.arange(batch, device=query.device) + first_batch
        factor = dropout_factor(batches, heads, rows, k_len, dropout_p, rng_state, work).masked_fill(own, 1.0)

    def softmax_sum(visible):
        weights, lse = softmax_and_lse(s, visible)
        # A row that sees itself alone copies its value, whatever its score is.
        alone = own.any(-1, keepdim=True) & (visible == own).all(-1, keepdim=True)
        weights = torch.where(alone, own.to(work), weights)
        if factor is not None:
            weights = weights * factor
        return weighted_values(weights, value, visible).masked_fill(~visible.any(-1, keepdim=True), 0.0), lse

    (out_text, lse_text), (out_image, lse_image) = softmax_sum(text), softmax_sum(image)
    lse = torch.stack((lse_text, lse_image))
    if merge == "sum":
        out = out_text + out_image
    elif merge == "lse":
        out, _ = softmax_sum(union)
    elif merge == "gate":
        gate = gate.to(work)
        out = gate[..., :1] * out_text + gate[..., 1:] * out_image
    else:
        out = torch.stack((out_text, out_image))
    return out.to(dtype), lse
