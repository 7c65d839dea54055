"""Python halves of linear attention's operators, as _ops.py has them for attention's: fake implementations, and the
gradient of the backward operator."""

import torch

from . import reference
from ._ops import _check_devices, _laid_out_like


@torch.library.register_fake("mmca_ext::linear_attention")
def _(query, key, value, state_S, state_z, key_mask, cu_seqlens_q, cu_seqlens_k, return_state, is_causal):
    _check_devices(
        query,
        key=key,
        value=value,
        state_S=state_S,
        state_z=state_z,
        key_mask=key_mask,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )
    out = _laid_out_like(query, value.shape[-1])
    if not return_state:
        return out, query.new_empty(0, dtype=torch.float64), query.new_empty(0, dtype=torch.float64)
    batch = query.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    z = query.new_empty((batch, key.shape[1], key.shape[-1]), dtype=torch.float64)
    return out, z.new_empty((*z.shape, value.shape[-1])), z


@torch.library.register_fake("mmca_ext::linear_attention_backward")
def _(
    grad_out,
    grad_S,
    grad_z,
    query,
    key,
    value,
    state_S,
    state_z,
    key_mask,
    cu_seqlens_q,
    cu_seqlens_k,
    is_causal,
):
    _check_devices(
        query,
        grad_out=grad_out,
        grad_S=grad_S,
        grad_z=grad_z,
        key=key,
        value=value,
        state_S=state_S,
        state_z=state_z,
        key_mask=key_mask,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )
    absent = query.new_empty(0, dtype=torch.float64)
    return (
        *(_laid_out_like(tensor, tensor.shape[-1]) for tensor in (query, key, value)),
        *(absent.new_empty(0) if t is None else t.new_empty(t.shape) for t in (state_S, state_z)),
    )


@torch.library.impl("mmca_ext::linear_attention_double_backward", "CompositeImplicitAutograd")
def _linear_attention_double_backward(
    grads,
    grad_out,
    grad_S,
    grad_z,
    query,
    key,
    value,
    state_S,
    state_z,
    key_mask,
    cu_seqlens_q,
    cu_seqlens_k,
    is_causal,
):
    """The gradients of linear_attention_backward's results, through the reference: exact and materialised."""
    create_graph = torch.is_grad_enabled()
    # The forward has settled on its dtypes. An autocast around the backward would cast the reference's products.
    with torch.enable_grad(), torch.autocast(query.device.type, enabled=False):
        # Fresh aliases: derivatives by these very arguments, not by what they may have been made from.
        arguments = [
            t if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
            for t in (grad_out, grad_S, grad_z, query, key, value, state_S, state_z)
        ]
        grad_out, grad_S, grad_z, query, key, value, state_S, state_z = arguments
        out, (S, z) = reference.linear_attention(
            query,
            key,
            value,
            is_causal,
            key_mask=key_mask,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            state=None if state_S is None else reference.LinearState(state_S, state_z),
            return_state=True,
        )
        inputs = [query, key, value, state_S, state_z]
        # A gradient that arrives at what is empty, for want of a state, is one of nothing.
        asked = [
            i
            for i, (t, arriving) in enumerate(zip(inputs, grads, strict=True))
            if t is not None and arriving is not None and arriving.shape == t.shape
        ]
        results, seeds = [out], [grad_out]
        if grad_S is not None:
            results, seeds = [out, S, z], [grad_out, grad_S.double(), grad_z.double()]
        first = torch.autograd.grad(results, [inputs[i] for i in asked], seeds, create_graph=True, allow_unused=True)
        used = [(g, grads[i]) for g, i in zip(first, asked, strict=True) if g is not None and g.requires_grad]
        by = [t for t in arguments if t is not None]
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
        if t is None:
            gradients.append(query.new_empty(0))
        else:
            argument, gradient = next(found)
            gradients.append(torch.zeros_like(argument) if gradient is None else gradient)
    return gradients
