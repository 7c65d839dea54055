"""Python halves of the compiled operators: fake implementations (shapes, dtypes and strides for torch.compile and
torch.export), and the gradient of the backward operator.

Memory layout, the same rule as in the operators: a (B, H, L, D) result lies in memory as (B, L, H, D) when its tensor
has heads inside rows (stride(1) < stride(2), what a projection's view gives), else as (B, H, L, D); a packed (T, H, D)
one is contiguous. `out` follows query, each gradient its own tensor. Merge "none" adds a first dimension of 2.
"""

import torch

from . import reference


def _laid_out_like(like, features, groups=()):
    """An empty tensor of like's shape (but for the features), dtype and layout."""
    *shape, _ = like.shape
    if like.dim() == 4 and like.stride(1) < like.stride(2):
        batch, heads, length = shape
        return like.new_empty(*groups, batch, length, heads, features).transpose(-3, -2)
    return like.new_empty(*groups, *shape, features)


def _check_devices(query, rng_state=None, **tensors):
    """The dispatcher takes the fake path for one meta tensor among real ones; nothing may come of such a call."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != query.device:
            raise ValueError(f"mmca_ext: {name} must be on query's device {query.device}, got {tensor.device}")
    if rng_state is not None and rng_state.device.type != "cpu" and not query.is_meta:
        raise ValueError(f"mmca_ext: rng_state must be on the CPU, got {rng_state.device}")


@torch.library.register_fake("mmca_ext::attention")
def _(
    query,
    key,
    value,
    attn_mask,
    gate,
    key_mask,
    modality,
    image_id,
    cu_seqlens_q,
    cu_seqlens_k,
    rng_state,
    save_for_backward,
    image_rows,
    merge,
    *numbers,
):
    _check_devices(
        query,
        rng_state,
        key=key,
        value=value,
        attn_mask=attn_mask,
        gate=gate,
        key_mask=key_mask,
        modality=modality,
        image_id=image_id,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )
    groups = () if modality is None else (2,)
    rows = query.shape[:3] if cu_seqlens_q is None else (query.shape[1], query.shape[0])
    out = _laid_out_like(query, value.shape[-1], groups if merge == "none" else ())
    lse = query.new_empty((*groups, *rows), dtype=torch.float64 if query.dtype == torch.float64 else torch.float32)
    lse_low = lse.new_empty(lse.shape if save_for_backward else (0,))
    separate = save_for_backward and modality is not None and merge in ("sum", "gate")
    group_out = lse.new_empty((*lse.shape, value.shape[-1]) if separate else (0,))
    return out, lse, lse_low, group_out


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
    group_out,
    attn_mask,
    gate,
    key_mask,
    modality,
    image_id,
    cu_seqlens_q,
    cu_seqlens_k,
    rng_state,
    attn_mask_gradient,
    *numbers,
):
    _check_devices(
        query,
        rng_state,
        grad_out=grad_out,
        grad_lse=grad_lse,
        key=key,
        value=value,
        out=out,
        lse=lse,
        lse_low=lse_low,
        group_out=group_out,
        attn_mask=attn_mask,
        gate=gate,
        key_mask=key_mask,
        modality=modality,
        image_id=image_id,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )
    wanted = attn_mask is not None and attn_mask_gradient and attn_mask.is_floating_point()
    return (
        *(_laid_out_like(tensor, tensor.shape[-1]) for tensor in (query, key, value)),
        attn_mask.new_empty(attn_mask.shape) if wanted else query.new_empty(0),
        query.new_empty(0) if gate is None else gate.new_empty(gate.shape),
    )


@torch.library.impl("mmca_ext::attention_double_backward", "CompositeImplicitAutograd")
def _attention_double_backward(
    grads,
    grad_out,
    grad_lse,
    query,
    key,
    value,
    attn_mask,
    gate,
    key_mask,
    modality,
    image_id,
    cu_seqlens_q,
    cu_seqlens_k,
    rng_state,
    image_rows,
    merge,
    scale,
    softcap,
    is_causal,
    window_left,
    window_right,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    deterministic,
):
    """The gradients of attention_backward's results, through the reference: exact and materialised."""
    create_graph = torch.is_grad_enabled()
    # The forward has settled on its dtypes. An autocast around the backward would cast the reference's products.
    with torch.enable_grad(), torch.autocast(query.device.type, enabled=False):
        # Fresh aliases: derivatives by these very arguments, not by what they may have been made from.
        arguments = [
            t
            if t is None or not t.is_floating_point()
            else t.view_as(t)
            if t.requires_grad
            else t.detach().requires_grad_()
            for t in (grad_out, grad_lse, query, key, value, attn_mask, gate)
        ]
        grad_out, grad_lse, query, key, value, attn_mask, gate = arguments
        common = {"dropout_p": dropout_p, "scale": scale, "softcap": softcap, "rng_state": rng_state}
        if modality is None:
            out, lse = reference.attention(
                query,
                key,
                value,
                attn_mask,
                is_causal=is_causal,
                key_mask=key_mask,
                window=(window_left, window_right),
                cu_seqlens_q=cu_seqlens_q,
                cu_seqlens_k=cu_seqlens_k,
                return_lse=True,
                **common,
            )
        else:
            out, lse = reference.mmca_attention(
                query,
                key,
                value,
                modality,
                image_rows=image_rows,
                merge=merge,
                gate=gate,
                image_id=image_id,
                cu_seqlens=cu_seqlens_q,
                return_lse=True,
                **common,
            )
        inputs = [query, key, value, attn_mask, gate]
        # What attention_backward did not compute is empty, and a gradient that arrives there is one of nothing.
        asked = [
            i
            for i, (t, arriving) in enumerate(zip(inputs, grads, strict=True))
            if t is not None and t.requires_grad and arriving is not None and arriving.shape == t.shape
        ]
        results, seeds = [out], [grad_out]
        if grad_lse is not None:
            results, seeds = [out, lse], [grad_out, grad_lse]
        first = torch.autograd.grad(results, [inputs[i] for i in asked], seeds, create_graph=True, allow_unused=True)
        used = [(g, grads[i]) for g, i in zip(first, asked, strict=True) if g is not None and g.requires_grad]
        by = [t for t in arguments if t is not None and t.requires_grad]
        second = [None] * len(by)
        if used:
            second = torch.autograd.grad(
                [g for g, _ in used],
                by,
                [arriving for _, arriving in used],
                create_graph=create_graph,
                allow_unused=True,
            )
    found = iter(zip(by, second, strict=True))
    gradients = []
    for t in arguments:
        if t is None or not t.requires_grad:
            gradients.append(query.new_empty(0))
        else:
            argument, gradient = next(found)
            gradients.append(torch.zeros_like(argument) if gradient is None else gradient)
    return gradients
