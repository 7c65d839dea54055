"""Attention with grouped heads: several query heads share one key/value head."""

import torch
import torch.nn.functional as F
from torch import nn

from .. import functional, reference
from ..reference.inputs import parse_window
from ._heads import (
    boolean,
    by_rank,
    check_context,
    check_dropout,
    check_heads,
    check_input,
    check_sizes,
    check_softcap,
    key_mask,
    merge_heads,
    split_heads,
)
from ._packed import attention_offsets
from .kv_cache import KVCache, check_cache
from .linear import NO_FORM, LinearCache, attend, check_linear, check_linear_cache
from .rotary import check_rotary, rotate_heads

QK_NORM_SCALE = 10.0  # the published default


def l2_normalised(heads):
    """Heads of length 1, in their dtype (autocast would leave them in another)."""
    return F.normalize(heads, dim=-1).to(heads.dtype)


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
        linear: linear attention (Katharopoulos et al. 2020, arXiv 2006.16236) in place of softmax: time linear in the
            length, and a LinearCache of constant size. Dropout then acts on the heads' output. Scores are never formed,
            so qk_norm, softcap, window, rotary and a call's attn_mask and bias do not go with it.
        flash: False computes the same through `mmca_ext.reference`, readable and slow.
        softcap: s = softcap * tanh(s / softcap) bounds the scores (Gemma 2, arXiv 2408.00118); None: no bound.
        window: (left, right): row i at p = i + (M - N) sees the keys p - left <= j <= p + right; None is unbounded.
        rotary: a RotaryEmbedding of dim_head features, for queries and keys of self-attention.

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
        *,
        softcap=None,
        window=None,
        rotary=None,
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        context_dim = dim if context_dim is None else context_dim
        check_sizes(dim=dim, context_dim=context_dim)
        check_heads(heads, kv_heads, dim_head)
        check_dropout(dropout)
        check_softcap(softcap)
        parse_window(window)
        check_rotary(rotary, dim_head)
        check_linear(linear, qk_norm=qk_norm, softcap=softcap, window=window is not None, rotary=rotary is not None)
        self.dim, self.heads, self.kv_heads, self.dim_head = dim, heads, kv_heads, dim_head
        self.causal, self.dropout, self.qk_norm, self.context_dim, self.flash = (
            causal,
            dropout,
            qk_norm,
            context_dim,
            flash,
        )
        self.softcap, self.window, self.rotary, self.linear = softcap, window, rotary, linear
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_k = nn.Linear(context_dim, kv_heads * dim_head, bias=False)
        self.to_v = nn.Linear(context_dim, kv_heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(
        self,
        x,
        context=None,
        mask=None,
        context_mask=None,
        attn_mask=None,
        bias=None,
        *,
        positions=None,
        cu_seqlens=None,
        context_cu_seqlens=None,
        max_seqlen=None,
        context_max_seqlen=None,
        cache=None,
    ):
        """Attend from x to itself, to context, or to what a cache holds and x.

        Args:
            x: (B, N, dim), or sequences packed into (T, dim) with cu_seqlens.
            context: (B, M, context_dim), or (T', context_dim) with context_cu_seqlens, or None for self-attention.
            mask: (B, N), True (or 1) = attend: padding of x's keys, for self-attention.
            context_mask: (B, M), the same for a context.
            attn_mask: True (or 1) = attend, by rank: (N|1, M), (B|1, N|1, M) or (B|1, H|1, N|1, M).
            bias: float, of the same shapes, added to the scores, with a gradient if it requires one.
            positions: of x's tokens, for rotary: see RotaryEmbedding.table, which may be given in their place. By
                default 0, 1, 2, ... in each sequence, or on from the cache's tokens, padding included.
            cu_seqlens, context_cu_seqlens: int32 or int64 (S + 1,) offsets of S packed sequences; each attends to
                itself, or to its context. No masks, bias or cache go with them.
            max_seqlen, context_max_seqlen: upper bounds on the packed lengths.
            cache: a KVCache; for linear=True a LinearCache. x is then the tokens that follow those in it (`mask` is
                theirs): they are appended, and M counts all. For causal=True this is what a call on the whole sequence
                gives these rows. A cache of `cache_context` takes the place of context and context_mask.

        Returns:
            (B, N, dim) or (T, dim); 0 for a row that may attend to nothing.
        """
        apart = {"mask": mask, "context_mask": context_mask, "attn_mask": attn_mask, "bias": bias, "cache": cache}
        offsets = attention_offsets(context, cu_seqlens, context_cu_seqlens, max_seqlen, context_max_seqlen, apart)
        check_input("x", x, self.dim, packed=bool(offsets))
        if cache is not None:
            check = check_linear_cache if self.linear else check_cache
            check(cache, x.shape[0], self.kv_heads, self.dim_head)
        query = split_heads(self.to_q(x), self.heads)
        if self.qk_norm:
            query = l2_normalised(query)
        if context is None and not (cache is not None and cache.frozen):
            if context_mask is not None:
                raise ValueError("context_mask belongs to a context; the padding of x's own keys is `mask`")
            if self.linear:
                return self._linear_self(query, x, mask, attn_mask, bias, positions, offsets, cache)
            before = 0 if cache is None else cache.length
            attn_mask = self._attn_mask(attn_mask, bias, x, before + x.shape[-2])
            query, key, value, padding = self._own_keys(query, x, mask, positions, cu_seqlens, cache)
        else:
            self._check_context(x, context, mask, context_mask, positions, cache, packed=bool(offsets))
            if self.linear:
                return self._linear_cross(query, context, context_mask, attn_mask, bias, offsets, cache)
            if cache is None:
                key, value = self._keys_and_values(context)
                padding = key_mask("context_mask", context_mask, *context.shape[:2])
            else:
                key, value, padding = cache.keys, cache.values, cache.key_mask
            attn_mask = self._attn_mask(attn_mask, bias, x, key.shape[2])
        out = (functional if self.flash else reference).attention(
            query,
            key,
            value,
            attn_mask,
            self.dropout if self.training else 0.0,
            self.causal,
            QK_NORM_SCALE if self.qk_norm else None,
            key_mask=padding,
            window=self.window,
            softcap=self.softcap,
            **offsets,
        )
        return self.to_out(merge_heads(out))

    def cache_context(self, context, context_mask=None):
        """The keys and values of a context, once for many calls: `layer(x, cache=layer.cache_context(context))`.

        Args:
            context: (B, M, context_dim).
            context_mask: (B, M), True (or 1) = attend.

        Returns:
            A frozen KVCache (for linear=True a LinearCache, its state); layers attend to it and append nothing.
        """
        check_input("context", context, self.context_dim)
        padding = key_mask("context_mask", context_mask, *context.shape[:2])
        if self.linear:
            key, value = self._keys_and_values(context)
            query = key.new_empty(key.shape[0], self.heads, 0, self.dim_head)
            _, state = attend(self, query, key, value, False, keep=True, key_mask=padding)
            return LinearCache.of_context(state, context.shape[1])
        return KVCache.of_context(*self._keys_and_values(context), padding)

    def _keys_and_values(self, source):
        key = split_heads(self.to_k(source), self.kv_heads)
        value = split_heads(self.to_v(source), self.kv_heads)
        return l2_normalised(key) if self.qk_norm else key, value

    def _linear_self(self, query, x, mask, attn_mask, bias, positions, offsets, cache):
        """Rows that attend to x, and to what a cache remembers."""
        self._refuse_pairs(attn_mask, bias)
        if positions is not None:
            raise ValueError("positions are for rotary, and the layer has none")
        if self.context_dim != self.dim:
            raise ValueError(f"context_dim={self.context_dim} is not dim={self.dim}, so the call needs a context")
        padding = None if offsets else key_mask("mask", mask, *x.shape[:2])
        key, value = self._keys_and_values(x)
        if cache is None:
            out = attend(self, query, key, value, self.causal, key_mask=padding, **offsets)
        else:
            state = cache.states[0]
            out, state = attend(self, query, key, value, self.causal, keep=True, key_mask=padding, state=state)
            cache.advance((state,), x.shape[1])
        return self.to_out(merge_heads(out))

    def _linear_cross(self, query, context, context_mask, attn_mask, bias, offsets, cache):
        """Rows that attend to a context, or to the state of one."""
        self._refuse_pairs(attn_mask, bias)
        padding = state = None
        if cache is None:
            key, value = self._keys_and_values(context)
            padding = None if offsets else key_mask("context_mask", context_mask, *context.shape[:2])
        else:
            key = value = query.new_empty(query.shape[0], self.kv_heads, 0, self.dim_head)
            state = cache.states[0]
            if self.causal and query.shape[2] > 1:
                raise ValueError("causal=True needs the context itself: its state does not tell which row sees what")
        out = attend(self, query, key, value, self.causal, key_mask=padding, state=state, **offsets)
        return self.to_out(merge_heads(out))

    def _refuse_pairs(self, attn_mask, bias):
        for name, given in (("attn_mask", attn_mask), ("bias", bias)):
            if given is not None:
                raise ValueError(
                    f"{name} does not go with linear=True: {NO_FORM}; padding of keys is mask or context_mask"
                )

    def _own_keys(self, query, x, mask, positions, cu_seqlens, cache):
        """The queries, rotated, and the keys, values and padding of x behind what the cache holds."""
        if self.context_dim != self.dim:
            raise ValueError(f"context_dim={self.context_dim} is not dim={self.dim}, so the call needs a context")
        padding = key_mask("mask", mask, *x.shape[:2])
        key, value = self._keys_and_values(x)
        query, key = rotate_heads(self.rotary, query, key, positions, cu_seqlens, cache)
        if cache is None:
            return query, key, value, padding
        cache.append(key, value, None if padding is None else padding.int())
        return query, cache.keys, cache.values, cache.key_mask

    def _check_context(self, x, context, mask, context_mask, positions, cache, packed):
        if mask is not None:
            raise ValueError("mask is the padding of x's keys, and with a context the keys are its: use context_mask")
        if self.rotary is not None or positions is not None:
            raise ValueError("positions and rotary are for self-attention, where they are those of one sequence")
        if cache is None:
            check_context("context", context, self.context_dim, "x", x, packed)
        elif context is not None:
            raise ValueError("context does not go with cache: `cache_context` makes a cache that stands for a context")
        elif context_mask is not None:
            raise ValueError("context_mask goes to `cache_context`: the cache knows the padding of its context")

    def _attn_mask(self, attn_mask, bias, x, k_len):
        shape = (x.shape[0], self.heads, x.shape[1], k_len)
        if attn_mask is not None:
            attn_mask = by_rank("attn_mask", boolean("attn_mask", attn_mask), *shape)
        if bias is None:
            return attn_mask
        if not isinstance(bias, torch.Tensor) or not bias.is_floating_point():
            raise TypeError(f"bias must be a floating-point tensor, got {getattr(bias, 'dtype', type(bias).__name__)}")
        bias = by_rank("bias", bias, *shape)
        return bias if attn_mask is None else bias.masked_fill(~attn_mask, -torch.inf)

    def extra_repr(self):
        return (
            f"dim={self.dim}, heads={self.heads}, kv_heads={self.kv_heads}, dim_head={self.dim_head}, "
            f"causal={self.causal}, dropout={self.dropout}, qk_norm={self.qk_norm}, flash={self.flash}, "
            f"softcap={self.softcap}, window={self.window}, linear={self.linear}"
        )
