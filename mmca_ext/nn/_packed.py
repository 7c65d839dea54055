"""Packed batches: sequences of unequal length behind one another, (T, dim), and the offsets of their first tokens."""

import torch


def check_offsets(name, offsets):
    """The kind of the offsets; the operators check their values."""
    if not isinstance(offsets, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(offsets).__name__}")
    if offsets.dim() != 1 or offsets.numel() < 1 or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name} must be int32 or int64 offsets of shape (S + 1,), got {offsets.dtype} {tuple(offsets.shape)}"
        )


def check_packing(cu_seqlens, belonging, apart):
    """cu_seqlens themselves, what is given only with them (`belonging`), and what never is (`apart`): name -> value."""
    if cu_seqlens is None:
        for name, value in belonging.items():
            if value is not None:
                raise ValueError(f"{name} belongs to cu_seqlens, and there are none")
        return
    check_offsets("cu_seqlens", cu_seqlens)
    for name, value in apart.items():
        if value is not None:
            raise ValueError(f"{name} does not go with cu_seqlens: packed tokens are all visible, and not cached")


def attention_offsets(context, cu_seqlens, context_cu_seqlens, max_seqlen, context_max_seqlen, apart):
    """The arguments of functional.attention for packed sequences, none for padded ones; see check_packing."""
    of_context = {"context_cu_seqlens": context_cu_seqlens, "context_max_seqlen": context_max_seqlen}
    check_packing(cu_seqlens, {"max_seqlen": max_seqlen, **of_context}, apart)
    if cu_seqlens is None:
        return {}
    if context is None:
        for name, value in of_context.items():
            if value is not None:
                raise ValueError(f"{name} belongs to a context, and there is none")
        context_cu_seqlens, context_max_seqlen = cu_seqlens, max_seqlen
    elif context_cu_seqlens is None:
        raise ValueError("a packed context needs context_cu_seqlens, the offsets of its sequences")
    else:
        check_offsets("context_cu_seqlens", context_cu_seqlens)
        if context_cu_seqlens.shape != cu_seqlens.shape:
            raise ValueError(
                "context_cu_seqlens must name as many sequences as cu_seqlens, "
                f"got {len(context_cu_seqlens) - 1} and {len(cu_seqlens) - 1}"
            )
    return {
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": context_cu_seqlens,
        "max_seqlen_q": max_seqlen,
        "max_seqlen_k": context_max_seqlen,
    }


def sequence_positions(cu_seqlens, tokens):
    """(T,): 0, 1, 2, ... in each sequence."""
    index = torch.arange(tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return index - cu_seqlens[torch.searchsorted(cu_seqlens, index, right=True) - 1]
