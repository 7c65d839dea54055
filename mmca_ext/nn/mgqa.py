"""Attention with grouped heads: several query heads share one key/value head."""

import torch
import torch.nn.functional as F
from torch import nn

from .. import functional, reference
from ._heads import (
    boolean,
    by_rank,
    check_context,
    check_dropout,
    check_heads,
    check_input,
    check_sizes,
    key_mask,
    merge_heads,
    refuse_linear,
    split_heads,
)

QK_NORM_SCALE = 10.0  # the published default


def l2_normalised(query, key, value):
    """Queries and keys of length 1 per head, in value's dtype (autocast would leave them in another)."""
    return F.normalize(query, dim=-1).to(value.dtype), F.normalize(key, dim=-1).to(value.dtype)


class MGQA(nn.Module):
    """Multi-grouped query attention, self or cross: Ainslie et al. 2023 (arXiv 2305.13245).

    Args:
        dim: features of x and of the result.
        heads: query heads; heads * dim_head need not be dim.
        kv_heads: key/value heads, a divisor of heads; None: heads. Query head h uses KV head h // (heads / kv_heads).
        dim_head: features per head, 1 to 256.
        causal: row i sees the keys j <= i + (M - N), BOTTOM-RIGHT aligned: with a cache or a context the last of the N
            rows sees all M keys. (SDPA's is_causal is top-left.)
        dropout: probability of dropping an attention weight, in training only.
        qk_norm: l2-normalise queries and keys per head and score with scale 10, in place of 1 / sqrt(dim_head).
        context_dim: features of a context; None: dim.
        linear: linear attention; not built yet.
        flash: False computes the same through `mmca_ext.reference`, readable and slow, and takes `bias`.

    Parameters: to_q.weight, to_k.weight, to_v.weight, to_out.weight. No biases.

    Raises:
        ValueError, TypeError: at construction and at the call, naming the argument, its value and what is accepted.
    """

    def __init__(
        self,
        dim,
        heads=8,
        kv_heads=None,
        dim_head=64,
        causal=False,
        dropout=0.0,
        qk_norm=False,
        context_dim=None,
        linear=False,
        flash=True,
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        context_dim = dim if context_dim is None else context_dim
        check_sizes(dim=dim, context_dim=context_dim)
        check_heads(heads, kv_heads, dim_head)
        check_dropout(dropout)
        refuse_linear(linear)
        self.dim, self.heads, self.kv_heads, self.dim_head = dim, heads, kv_heads, dim_head
        self.causal, self.dropout, self.qk_norm, self.context_dim, self.flash = (
            causal,
            dropout,
            qk_norm,
            context_dim,
            flash,
        )
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_k = nn.Linear(context_dim, kv_heads * dim_head, bias=False)
        self.to_v = nn.Linear(context_dim, kv_heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x, context=None, mask=None, context_mask=None, attn_mask=None, bias=None):
        """Attend from x to itself, or to context.

        Args:
            x: (B, N, dim).
            context: (B, M, context_dim), or None for self-attention.
            mask: (B, N), True (or 1) = attend: padding of x's keys, for self-attention.
            context_mask: (B, M), the same for a context.
            attn_mask: True (or 1) = attend, by rank: (N|1, M), (B|1, N|1, M) or (B|1, H|1, N|1, M).
            bias: float, of the same shapes, added to the scores, with a gradient if it requires one; needs flash=False
                until the kernels have it.

        Returns:
            (B, N, dim); 0 for a row that may attend to nothing.
        """
        check_input("x", x, self.dim)
        if context is None:
            if self.context_dim != self.dim:
                raise ValueError(f"context_dim={self.context_dim} is not dim={self.dim}, so the call needs a context")
            if context_mask is not None:
                raise ValueError("context_mask belongs to a context; the padding of x's own keys is `mask`")
            source, padding = x, key_mask("mask", mask, *x.shape[:2])
        else:
            if mask is not None:
                raise ValueError(
                    "mask is the padding of x's keys, and with a context the keys are its: use context_mask"
                )
            check_context("context", context, self.context_dim, "x", x)
            source, padding = context, key_mask("context_mask", context_mask, *context.shape[:2])

        query = split_heads(self.to_q(x), self.heads)
        key = split_heads(self.to_k(source), self.kv_heads)
        value = split_heads(self.to_v(source), self.kv_heads)
        scale = None
        if self.qk_norm:
            query, key = l2_normalised(query, key, value)
            scale = QK_NORM_SCALE
        if attn_mask is not None or bias is not None:
            attn_mask = self._attn_mask(attn_mask, bias, x.shape[0], x.shape[1], source.shape[1])
        out = (functional if self.flash else reference).attention(
            query,
            key,
            value,
            attn_mask,
            self.dropout if self.training else 0.0,
            self.causal,
            scale,
            key_mask=padding,
        )
        return self.to_out(merge_heads(out))

    def _attn_mask(self, attn_mask, bias, batch, q_len, k_len):
        shape = (batch, self.heads, q_len, k_len)
        if attn_mask is not None:
            attn_mask = by_rank("attn_mask", boolean("attn_mask", attn_mask), *shape)
        if bias is None:
            return attn_mask
        if not isinstance(bias, torch.Tensor) or not bias.is_floating_point():
            raise TypeError(f"bias must be a floating-point tensor, got {getattr(bias, 'dtype', type(bias).__name__)}")
        if self.flash:
            raise NotImplementedError("bias is not built into the kernels yet; flash=False (mmca_ext.reference) has it")
        bias = by_rank("bias", bias, *shape)
        return bias if attn_mask is None else bias.masked_fill(~attn_mask, -torch.inf)

    def extra_repr(self):
        return (
            f"dim={self.dim}, heads={self.heads}, kv_heads={self.kv_heads}, dim_head={self.dim_head}, "
            f"causal={self.causal}, dropout={self.dropout}, qk_norm={self.qk_norm}, flash={self.flash}"
        )
