"""Cross-attention between two modalities."""

from torch import nn

from .. import functional
from ._heads import (
    boolean,
    by_rank,
    check_choice,
    check_context,
    check_dropout,
    check_heads,
    check_input,
    check_sizes,
    key_mask,
    merge_heads,
    split_heads,
)
from ._packed import attention_offsets
from .kv_cache import KVCache, check_cache

STRATEGIES = (None, "concatenate", "average")


class MultiModalCrossAttention(nn.Module):
    """Multi-head attention of one sequence to another; the documented zeta.nn.MultiModalCrossAttention.

    out = to_out(merge(softmax(q k^T / sqrt(dim_head)) v)), q from x, k and v from context: Vaswani et al. 2017
    (arXiv 1706.03762), section 3.2.

    Args:
        dim: features of x and of the result.
        heads: attention heads; heads * dim_head need not be dim.
        context_dim: features of context.
        dim_head: features per head, 1 to 256.
        dropout: probability of dropping an attention weight, in training only.
        qk: LayerNorm (of width heads * dim_head) on queries and keys.
        post_attn_norm: LayerNorm on the merged heads, before the output projection.
        attention_strategy: how heads become one: None or "concatenate", or "average" (their mean, dim_head wide).
        mask: True (or 1) = attend; booleans or the integers 0 and 1. Read by its rank: (N|1, M), (B|1, N|1, M) or
            (B|1, H|1, N|1, M). A buffer outside the state dict; `layer.mask = other` is welcome, None removes it.

    Parameters: to_q.weight, to_k.weight, to_v.weight, to_out.0.weight, to_out.0.bias; norm_q, norm_k with qk=True,
    norm_post_attn with post_attn_norm=True. norm_* that the options do not ask for are dropped from loaded checkpoints.

    Raises:
        ValueError, TypeError: at construction and at the call, naming the argument, its value and what is accepted.
    """

    def __init__(
        self,
        dim,
        heads,
        context_dim,
        dim_head=64,
        dropout=0.1,
        qk=False,
        post_attn_norm=False,
        attention_strategy=None,
        mask=None,
    ):
        super().__init__()
        check_sizes(dim=dim, context_dim=context_dim)
        check_heads(heads, heads, dim_head)
        check_dropout(dropout)
        check_choice("attention_strategy", attention_strategy, STRATEGIES)
        if mask is not None:
            mask = boolean("mask", mask)
            if mask.dim() not in (2, 3, 4):
                raise ValueError(
                    "mask must have shape (N|1, M), (B|1, N|1, M) or (B|1, H|1, N|1, M), "
                    f"got {tuple(mask.shape)}; padding of keys (B, M) is the call's context_mask"
                )
        width = heads * dim_head
        merged = dim_head if attention_strategy == "average" else width
        self.dim, self.heads, self.context_dim, self.dim_head = dim, heads, context_dim, dim_head
        self.dropout, self.qk, self.post_attn_norm = dropout, qk, post_attn_norm
        self.attention_strategy = attention_strategy

        self.to_q = nn.Linear(dim, width, bias=False)
        self.to_k = nn.Linear(context_dim, width, bias=False)
        self.to_v = nn.Linear(context_dim, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(merged, dim))
        if qk:
            self.norm_q = nn.LayerNorm(width)
            self.norm_k = nn.LayerNorm(width)
        if post_attn_norm:
            self.norm_post_attn = nn.LayerNorm(merged)
        self.register_buffer("mask", mask, persistent=False)

    def forward(
        self,
        x,
        context=None,
        mask=None,
        context_mask=None,
        *,
        cu_seqlens=None,
        context_cu_seqlens=None,
        max_seqlen=None,
        context_max_seqlen=None,
        cache=None,
    ):
        """Attend from x to context.

        Args:
            x: (B, N, dim), or sequences packed into (T, dim) with cu_seqlens.
            context: (B, M, context_dim), or (T', context_dim) with context_cu_seqlens.
            mask: as at construction; both apply.
            context_mask: (B, M), True (or 1) = attend: padding of the context.
            cu_seqlens, context_cu_seqlens: int32 or int64 (S + 1,) offsets of S packed sequences and their contexts. No
                masks and no cache go with them.
            max_seqlen, context_max_seqlen: upper bounds on the packed lengths.
            cache: of `cache_context`, in place of context and context_mask.

        Returns:
            (B, N, dim) or (T, dim). A row that may attend to nothing is the projection's bias.
        """
        given = {"mask": mask, "mask (at construction)": self.mask, "context_mask": context_mask, "cache": cache}
        offsets = attention_offsets(context, cu_seqlens, context_cu_seqlens, max_seqlen, context_max_seqlen, given)
        check_input("x", x, self.dim, packed=bool(offsets))
        if cache is None:
            check_context("context", context, self.context_dim, "x", x, packed=bool(offsets))
            key, value = self._keys_and_values(context)
            padding = key_mask("context_mask", context_mask, *context.shape[:2])
        else:
            self._check_cache(cache, x, context, context_mask)
            key, value, padding = cache.keys, cache.values, cache.key_mask
        query = self.to_q(x)
        if self.qk:
            query = self.norm_q(query)
        out = functional.attention(
            split_heads(query, self.heads),
            key,
            value,
            self._attn_mask(mask, x, key.shape[2]),
            self.dropout if self.training else 0.0,
            key_mask=padding,
            **offsets,
        )
        out = out.mean(1) if self.attention_strategy == "average" else merge_heads(out)
        if self.post_attn_norm:
            out = self.norm_post_attn(out)
        return self.to_out(out)

    def cache_context(self, context, context_mask=None):
        """The keys and values of a context, once for many calls: `layer(x, cache=layer.cache_context(context))`.

        Args:
            context: (B, M, context_dim).
            context_mask: (B, M), True (or 1) = attend.

        Returns:
            A frozen KVCache.
        """
        check_input("context", context, self.context_dim)
        padding = key_mask("context_mask", context_mask, *context.shape[:2])
        return KVCache.of_context(*self._keys_and_values(context), padding)

    def _keys_and_values(self, context):
        key, value = self.to_k(context), self.to_v(context)
        if self.qk:
            key = self.norm_k(key)
        return split_heads(key, self.heads), split_heads(value, self.heads)

    def _check_cache(self, cache, x, context, context_mask):
        check_cache(cache, x.shape[0], self.heads, self.dim_head)
        if not cache.frozen:
            raise ValueError("cache must be one of `cache_context`")
        if context is not None:
            raise ValueError("context does not go with cache, which stands for one")
        if context_mask is not None:
            raise ValueError("context_mask goes to `cache_context`: the cache knows the padding of its context")

    def _attn_mask(self, mask, x, k_len):
        shape = (x.shape[0], self.heads, x.shape[1], k_len)
        given = [by_rank("mask", boolean("mask", m), *shape) for m in (self.mask, mask) if m is not None]
        if not given:
            return None
        return given[0] if len(given) == 1 else given[0] & given[1]

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # The published layer always has norm_q and norm_k, used or not.
        kept = [name for name in ("norm_q", "norm_k", "norm_post_attn") if hasattr(self, name)]
        for key in [key for key in state_dict if key.startswith(prefix + "norm_")]:
            if key[len(prefix) :].split(".")[0] not in kept:
                del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self):
        return (
            f"dim={self.dim}, heads={self.heads}, context_dim={self.context_dim}, dim_head={self.dim_head}, "
            f"dropout={self.dropout}, attention_strategy={self.attention_strategy!r}"
        )
