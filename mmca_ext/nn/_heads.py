"""What the layers share: splitting features into heads without a copy, and their checks of options and masks."""

import torch


def split_heads(features, heads):
    """(B, N, H * D) -> (B, H, N, D), a view with heads inside rows: the operators read it and answer in kind.

    Packed (T, H * D) -> (T, H, D).
    """
    *tokens, width = features.shape
    features = features.view(*tokens, heads, width // heads)
    return features.transpose(1, 2) if len(tokens) == 2 else features


def merge_heads(features):
    """(B, H, N, D) -> (B, N, H * D), a view of what the operators return for split_heads' queries; packed likewise."""
    return features.transpose(1, 2).flatten(2) if features.dim() == 4 else features.flatten(1)


def check_sizes(**sizes):
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}")


def check_heads(heads, kv_heads, dim_head):
    check_sizes(heads=heads, kv_heads=kv_heads, dim_head=dim_head)
    if heads % kv_heads:
        raise ValueError(f"kv_heads must divide heads={heads}, got {kv_heads}")
    if dim_head > 256:
        raise ValueError(f"dim_head must be at most 256, got {dim_head}")


def check_dropout(dropout):
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout must be in [0, 1], got {dropout!r}")


def check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def check_softcap(softcap):
    number = isinstance(softcap, (int, float)) and not isinstance(softcap, bool)
    if softcap is not None and not (number and 0.0 <= softcap < float("inf")):
        raise ValueError(f"softcap must be a positive number or None, got {softcap!r}")


def check_input(name, x, dim, packed=False):
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dim() != (2 if packed else 3) or x.shape[-1] != dim:
        shape = f"(T, {dim}) with cu_seqlens" if packed else f"(B, N, {dim})"
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")


def check_context(name, context, dim, x_name, x, packed=False):
    check_input(name, context, dim, packed)
    if not packed and context.shape[0] != x.shape[0]:
        raise ValueError(f"{x_name} and {name} differ in batch: {x.shape[0]} and {context.shape[0]}")


def check_ids(name, ids, x):
    """One integer per token of x; the operators check their values."""
    if not isinstance(ids, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(ids).__name__}")
    if ids.shape != x.shape[:-1]:
        raise ValueError(f"{name} must have shape {tuple(x.shape[:-1])}, got {tuple(ids.shape)}")


def boolean(name, mask):
    """A mask as booleans, True = attend: from booleans or the integers 0 and 1."""
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(mask).__name__}")
    if mask.dtype == torch.bool:
        return mask
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"{name} must be boolean or hold the integers 0 and 1, got {mask.dtype}")
    # The values are looked at where that is free: not in a graph, not by waiting for a device.
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(
            f"{name} must be boolean or hold the integers 0 and 1, got values from {int(mask.min())} to "
            f"{int(mask.max())}"
        )
    return mask != 0


def key_mask(name, mask, batch, length):
    """Key padding (B, M) as booleans, or None."""
    if mask is None:
        return None
    mask = boolean(name, mask)
    if tuple(mask.shape) != (batch, length):
        raise ValueError(f"{name} must have shape (B, M) = ({batch}, {length}), got {tuple(mask.shape)}")
    return mask


def by_rank(name, mask, batch, heads, q_len, k_len):
    """A mask or bias as a 4-D view that broadcasts to (B, H, N, M). Its rank alone says what its dimensions are."""
    size, rank = mask.shape, mask.dim()
    full = (batch, heads, q_len, k_len)
    axes = {2: (2, 3), 3: (0, 2, 3), 4: (0, 1, 2, 3)}.get(rank)
    if axes is None or size[-1] != k_len or any(n not in (1, full[axis]) for n, axis in zip(size, axes, strict=True)):
        raise ValueError(
            f"{name} must have shape (N|1, M), (B|1, N|1, M) or (B|1, H|1, N|1, M) with B={batch}, H={heads}, "
            f"N={q_len}, M={k_len}, got {tuple(size)}; padding of keys (B, M) has its own argument"
        )
    return mask[None, None] if rank == 2 else mask[:, None] if rank == 3 else mask
