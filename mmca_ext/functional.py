"""The operators. Tensors are (B, H, L, D), as in `torch.nn.functional.scaled_dot_product_attention`, with any strides.

!!! `is_causal` HERE IS BOTTOM-RIGHT ALIGNED: query row i sees the keys j <= i + (Lk - Lq), so the last query sees every
!!! key (FlashAttention's convention, what decoding with a KV cache needs). SDPA's `is_causal` is top-left, j <= i. The
!!! two agree only when Lq == Lk.

Packed batches are (T, H, D): sequences one after the other, without padding, where `cu_seqlens` says (0, end of the
first, end of the second, ...). `mmca_ext.reference` has every function here in plain PyTorch.
"""

import torch
from torch.overrides import is_tensor_like

from .reference import LinearState, attention_map, dropout_mask, merge_attention
from .reference.inputs import parse_window
from .reference.linear import check_state
from .reference.mmca import IMAGE_ROWS, MERGES
from .reference.philox import _draw_rng_state

__all__ = [
    "LinearState",
    "attention",
    "attention_map",
    "dropout_mask",
    "linear_attention",
    "merge_attention",
    "mmca_attention",
]

_attention = torch.ops.mmca_ext.attention.default
_linear_attention = torch.ops.mmca_ext.linear_attention.default


def _require_tensors(function, names, needed, *tensors):
    """TypeError unless they are tensors; all but the first `needed` may be None. The dispatcher has a RuntimeError for
    this, and would make None a tensor without a shape, and an mmca_attention without modality an attention."""
    for i, tensor in enumerate(tensors):
        if type(tensor) is not torch.Tensor and (tensor is not None or i < needed) and not is_tensor_like(tensor):
            raise TypeError(f"mmca_ext.{function}: {names[i]} must be a tensor, got {type(tensor).__name__}")


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
):
    """Attention with grouped heads: softmax of scale * Q K^T over the visible keys, times V. Nothing is Lq x Lk.

    CAUSAL IS BOTTOM-RIGHT: row i sees j <= i + (Lk - Lq). SDPA's `is_causal` is top-left and differs when Lq != Lk.

    Sources: Vaswani et al. 2017 (arXiv 1706.03762), eq. 1; grouped heads: Ainslie et al. 2023 (arXiv 2305.13245);
    the streaming softmax and its backward: Dao et al. 2022 (arXiv 2205.14135), algorithms 1 and 4.

    Args:
        query: (B, Hq, Lq, D), or packed (Tq, Hq, D); float32, float64, bfloat16 or float16. D, Dv: 1 to 256. Scores,
            softmax and sums are float32 (float64 for float64).
        key: (B, Hkv, Lk, D) or (Tk, Hkv, D). Hq is a multiple of Hkv; query head h uses KV head h // (Hq / Hkv).
        value: (B, Hkv, Lk, Dv) or (Tk, Hkv, Dv).
        attn_mask: broadcastable to (B, Hq, Lq, Lk). Boolean: True = attend. Floating-point, of any of these dtypes: a
            bias, added to the scores; -inf hides; its gradient has its shape and dtype.
        dropout_p: probability of dropping an attention weight, in [0, 1]; see `dropout_mask`.
        is_causal: row i sees j <= i + (Lk - Lq).
        scale: factor on the scores; 1 / sqrt(D) by default.
        key_mask: boolean (B, Lk), True = attend: padding, cheaper than a mask of all pairs.
        window: (left, right), inclusive: row i at p = i + (Lk - Lq) sees p - left <= j <= p + right; None or -1 is
            unbounded. All of attn_mask, key_mask, is_causal and window apply together.
        softcap: s = softcap * tanh(s / softcap), before a bias (Gemma 2, arXiv 2408.00118); None or 0: none.
        generator: torch.Generator the dropout seed is drawn from; by default the CPU's, whatever query's device. One of
            a GPU is waited for.
        cu_seqlens_q, cu_seqlens_k: int32 or int64 (N + 1,), offsets of N packed sequences: from 0, not decreasing, at
            most Tq, Tk. Rows past the last offset are 0. They take no attn_mask or key_mask.
        max_seqlen_q, max_seqlen_k: upper bounds on the lengths, checked; not needed.
        deterministic: the same bits every time, also where that is slower, as `torch.use_deterministic_algorithms`
            asks for everywhere. On the CPU it changes nothing; on CUDA sums of gradients over blocks, and over what a
            bias was broadcast to, depend on the order of blocks otherwise. Every time is every call of these shapes on
            this GPU: in 16 bits the last bits of a row may change with the number and the lengths of all sequences,
            among whose rows and keys the GPU's blocks are shared out, though never with what another sequence holds.
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        out (B, Hq, Lq, Dv) in query's dtype (autocast's, under autocast), laid out in memory as query is: where query
        is a (B, L, H, D) projection seen as (B, H, L, D), `out.transpose(1, 2).flatten(2)` is free; packed
        (Tq, Hq, Dv). With return_lse the pair (out, lse), lse (B, Hq, Lq) or (Hq, Tq) in float32 (float64 for float64),
        natural logarithm, differentiable. A row that sees no key is 0, its lse -inf, its gradients 0.

    Raises:
        ValueError, TypeError: shapes, dtypes or values that do not fit.
    """
    names = "query", "key", "value", "attn_mask", "key_mask", "cu_seqlens_q", "cu_seqlens_k"
    _require_tensors("attention", names, 3, query, key, value, attn_mask, key_mask, cu_seqlens_q, cu_seqlens_k)
    left, right = (-1, -1) if window is None else parse_window(window)
    rng_state = None if dropout_p == 0.0 else _draw_rng_state(generator)
    out, lse, _, _ = _attention(
        query,
        key,
        value,
        attn_mask,
        None,
        key_mask,
        None,
        None,
        cu_seqlens_q,
        cu_seqlens_k,
        rng_state,
        False,
        "self",
        "sum",
        scale,
        0.0 if softcap is None else softcap,
        is_causal,
        left,
        right,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        deterministic,
    )
    return (out, lse) if return_lse else out


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
):
    """Multi-modal causal attention on one sequence of text and image tokens, with one softmax per modality.

    Source: Yao et al., "DeepSpeed-VisualChat", arXiv 2309.14327, section on Multi-Modal Causal Attention. The attention
    is causal by position: the queries are the last Lq tokens, row i stands at p = i + (Lk - Lq).

    A text row has two softmaxes, over the text and over the image tokens j <= p; before the first image the image term
    is 0. An image row, by `image_rows`:
        "self": copies its own value ("visual tokens attend only to themselves"); costs O(D).
        "block": attends to all tokens of its own image, earlier and later. An image is a maximal run of neighbouring
            non-text tokens of one modality, or, given `image_id`, of one image_id.
        "causal": like a text row, itself included in the image group.
        "self+text": its own value as the image term, plus a softmax over the earlier text.
    Padding is never a key, and its rows are 0.

    Args:
        query: (B, Hq, Lq, D), the last Lq tokens, or packed (T, Hq, D); float32, float64, bfloat16 or float16. D, Dv: 1
            to 256. Scores, softmax and sums are float32 (float64 for float64).
        key, value: (B, Hkv, Lk, D) and (B, Hkv, Lk, Dv), or (T, Hkv, D) and (T, Hkv, Dv); query head h uses KV head
            h // (Hq / Hkv).
        modality: integers (B, Lk) or (T,): 0 padding, 1 text, 2 and above non-text.
        image_rows: "self", "block", "causal" or "self+text".
        merge: how the two terms become one: "sum"; "lse": sum_r exp(lse_r - LSE) O_r, exactly the joint softmax over
            both groups, for weights trained with ordinary causal attention; "gate": sum_r gate_r O_r, the way of
            Flamingo (arXiv 2204.14198); "none": both, apart.
        gate: with merge="gate" alone: floats broadcastable to (B, Hq, Lq, 2) or (T, Hq, 2), weights of the text and of
            the image term; differentiable.
        image_id: integers like modality, see "block".
        dropout_p, scale, softcap, generator, deterministic: as in `attention`. The own value of an image row under
            "self" and "self+text" is not dropped.
        cu_seqlens, max_seqlen: offsets of packed sequences and an upper bound on their lengths, as in `attention`.
        return_lse: also return the log-sum-exp of each group.

    Returns:
        out (B, Hq, Lq, Dv) in query's dtype (autocast's, under autocast), laid out in memory as query is, or packed
        (T, Hq, Dv); with return_lse (out, lse), lse (2, B, Hq, Lq) or (2, Hq, T) of text and image in float32 (float64
        for float64), -inf for an empty group, differentiable. With merge="none" always (O, lse), O (2, B, Hq, Lq, Dv)
        or (2, T, Hq, Dv).

    Raises:
        ValueError, TypeError: shapes, dtypes or values that do not fit.
    """
    names = "query", "key", "value", "modality", "gate", "image_id", "cu_seqlens"
    _require_tensors("mmca_attention", names, 4, query, key, value, modality, gate, image_id, cu_seqlens)
    if image_rows not in IMAGE_ROWS:
        raise ValueError(f"image_rows must be one of {IMAGE_ROWS}, got {image_rows!r}")
    if merge not in MERGES:
        raise ValueError(f"merge must be one of {MERGES}, got {merge!r}")
    rng_state = None if dropout_p == 0.0 else _draw_rng_state(generator)
    out, lse, _, _ = _attention(
        query,
        key,
        value,
        None,
        gate,
        None,
        modality,
        image_id,
        cu_seqlens,
        cu_seqlens,
        rng_state,
        False,
        image_rows,
        merge,
        scale,
        0.0 if softcap is None else softcap,
        False,
        -1,
        -1,
        max_seqlen,
        max_seqlen,
        dropout_p,
        deterministic,
    )
    return (out, lse) if return_lse or merge == "none" else out


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
    """Attention in time linear in the sequence length and constant memory: no softmax, a state in place of a KV cache.

    out_i = phi(q_i) . S_i / (phi(q_i) . z_i), S_i = sum_j phi(k_j) v_j^T, z_i = sum_j phi(k_j), phi(x) = elu(x) + 1,
    over the keys j that row i sees and those in `state`. There is no scale, no bias and no mask of pairs: only sums
    over keys are linear.

    CAUSAL IS BOTTOM-RIGHT: row i sees j <= i + (Lk - Lq).

    Source: Katharopoulos et al. 2020 (arXiv 2006.16236), eq. 5 to 7 (feature map), 9 to 12 (causal), 16 to 20 (state).

    Args:
        query: (B, Hq, Lq, D), or packed (Tq, Hq, D); float32, float64, bfloat16 or float16. D, Dv: 1 to 256.
        key: (B, Hkv, Lk, D) or (Tk, Hkv, D). Hq is a multiple of Hkv; query head h uses KV head h // (Hq / Hkv).
        value: (B, Hkv, Lk, Dv) or (Tk, Hkv, Dv).
        is_causal: row i sees j <= i + (Lk - Lq).
        key_mask: boolean (B, Lk) or (Tk,), True = attend: padding, or one group of keys.
        cu_seqlens_q, cu_seqlens_k: int32 or int64 (N + 1,), offsets of N packed sequences: from 0, not decreasing, at
            most Tq, Tk. Rows past the last offset are 0.
        state: LinearState(S (B, Hkv, D, Dv), z (B, Hkv, D)), float64 or float32, of earlier keys: every row sees them.
            Packed: of each sequence, (N, ...). It may have gradients.
        return_state: also return the state after this call's keys, differentiable. `linear_attention(*token, True,
            state=state, return_state=True)` for one token after the other gives the rows of one call on all of them,
            each in O(1).

    Returns:
        out (B, Hq, Lq, Dv) in query's dtype (autocast's, under autocast), laid out in memory as query is, or (Tq, Hq,
        Dv). A row that sees neither key nor state is 0, and so are its gradients. With return_state (out,
        LinearState), the state float64 whatever the tensors are: it is carried over any number of calls, and must not
        lose what each adds. Within a call sums are float32 (float64 for float64) over a chunk and a segment of the
        sequence, and float64 over segments: errors do not grow with the length.

    Raises:
        ValueError, TypeError: shapes, dtypes or values that do not fit.
    """
    names = "query", "key", "value", "key_mask", "cu_seqlens_q", "cu_seqlens_k"
    _require_tensors("linear_attention", names, 3, query, key, value, key_mask, cu_seqlens_q, cu_seqlens_k)
    S, z = (None, None) if state is None else check_state(state)
    out, S, z = _linear_attention(
        query, key, value, S, z, key_mask, cu_seqlens_q, cu_seqlens_k, bool(return_state), bool(is_causal)
    )
    return (out, LinearState(S, z)) if return_state else out
