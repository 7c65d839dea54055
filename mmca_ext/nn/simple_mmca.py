"""Multi-modal attention over two separate sequences, visual and textual."""

from typing import NamedTuple

import torch
from torch import nn

from ._heads import check_context, check_input, check_sizes
from .kv_cache import KVCache
from .linear import LinearCache
from .mgqa import MGQA


class SimpleMMCAOutput(NamedTuple):
    """visual (B, Nv, dim) and text (B, Nt, dim)."""

    visual: torch.Tensor
    text: torch.Tensor


class SimpleMMCACache(NamedTuple):
    """What SimpleMMCA.decode keeps: the keys and values of the text so far, and those of the image, encoded once; of a
    linear layer their states."""

    text: KVCache | LinearCache
    visual: KVCache | LinearCache


class SimpleMMCA(nn.Module):
    """The documented mmca_mgqa.attention.SimpleMMCA: visual tokens attend to each other, text to text and to the image.

        visual    = visual_self_attn(v)                                    bidirectional
        text_self = textual_self_attn(t)                                   causal if `causal`
        text      = text_self + cross_attn(text_self, context=visual)

    Each of the three is an MGQA, with one softmax of its own per modality: the idea of multi-modal causal attention
    (Yao et al., arXiv 2309.14327). For one interleaved sequence see MultiModalCausalAttention.

    Args:
        dim: features of both sequences and of the results.
        heads: query heads.
        kv_heads: key/value heads, a divisor of heads; None: 2 where that divides heads, else 1.
        dropout: probability of dropping an attention weight, in training only.
        causal: text row i sees the text j <= i.
        qk_norm: l2-normalised queries and keys, scale 10.
        flash: False computes the same through `mmca_ext.reference`.
        dim_head: features per head, 1 to 256.
        linear: linear attention in all three, in place of softmax: see MGQA. qk_norm does not go with it.

    Raises:
        ValueError, TypeError: at construction and at the call, naming the argument, its value and what is accepted.
    """

    def __init__(
        self,
        dim,
        heads,
        kv_heads=None,
        dropout=0.1,
        causal=True,
        qk_norm=False,
        flash=True,
        dim_head=64,
        linear=False,
    ):
        super().__init__()
        check_sizes(dim=dim, heads=heads)
        if kv_heads is None:
            kv_heads = 1 if heads % 2 else 2
        self.dim = dim

        def mgqa(causal):
            return MGQA(dim, heads, kv_heads, dim_head, causal, dropout, qk_norm, linear=linear, flash=flash)

        self.visual_self_attn = mgqa(causal=False)
        self.textual_self_attn = mgqa(causal=causal)
        self.cross_attn = mgqa(causal=False)

    def forward(
        self,
        v,
        t,
        visual_mask=None,
        text_mask=None,
        *,
        visual_cu_seqlens=None,
        text_cu_seqlens=None,
        visual_max_seqlen=None,
        text_max_seqlen=None,
    ):
        """Attend within and across the modalities.

        Args:
            v: visual tokens (B, Nv, dim), or sequences packed into (Tv, dim) with visual_cu_seqlens.
            t: text tokens (B, Nt, dim), or (Tt, dim) with text_cu_seqlens.
            visual_mask: (B, Nv), True (or 1) = attend: padding of the visual tokens, as keys of both modalities.
            text_mask: (B, Nt), the same of the text.
            visual_cu_seqlens, text_cu_seqlens: int32 or int64 (S + 1,) offsets of S packed samples, given together. No
                masks go with them.
            visual_max_seqlen, text_max_seqlen: upper bounds on the packed lengths.

        Returns:
            The named tuple (visual (B, Nv, dim), text (B, Nt, dim)), or ((Tv, dim), (Tt, dim)).
        """
        packed = visual_cu_seqlens is not None
        if packed != (text_cu_seqlens is not None):
            raise ValueError("visual_cu_seqlens and text_cu_seqlens go together")
        check_input("v", v, self.dim, packed)
        check_context("t", t, self.dim, "v", v, packed)
        of_visual = {"cu_seqlens": visual_cu_seqlens, "max_seqlen": visual_max_seqlen}
        of_text = {"cu_seqlens": text_cu_seqlens, "max_seqlen": text_max_seqlen}
        of_context = {f"context_{name}": value for name, value in of_visual.items()}
        visual = self.visual_self_attn(v, mask=visual_mask, **of_visual)
        text = self.textual_self_attn(t, mask=text_mask, **of_text)
        cross = self.cross_attn(text, visual, context_mask=visual_mask, **of_text, **of_context)
        return SimpleMMCAOutput(visual, text + cross)

    def make_cache(self, v, capacity=None, visual_mask=None):
        """Encode the image once, for `decode`.

        Args:
            v: visual tokens (B, Nv, dim).
            capacity: the most text tokens there will be, padding included; for linear=True not needed.
            visual_mask: (B, Nv), True (or 1) = attend.

        Returns:
            SimpleMMCACache, without text yet.
        """
        if not self.textual_self_attn.causal:
            raise ValueError("generation needs causal=True: else every text token changes the rows before it")
        check_input("v", v, self.dim)
        visual = self.visual_self_attn(v, mask=visual_mask)
        if self.textual_self_attn.linear:
            text = LinearCache.for_layer(self.textual_self_attn, v.shape[0])
        else:
            text = KVCache.for_layer(self.textual_self_attn, v.shape[0], capacity, visual.dtype)
        return SimpleMMCACache(text, self.cross_attn.cache_context(visual, visual_mask))

    def decode(self, t, cache, text_mask=None):
        """The rows that `forward` would give the text tokens t, which follow those in the cache and are put there.

        Args:
            t: text tokens (B, n, dim).
            cache: of `make_cache`.
            text_mask: (B, n), True (or 1) = attend: padding, as left of a shorter prompt.

        Returns:
            text (B, n, dim).
        """
        if not isinstance(cache, SimpleMMCACache):
            raise TypeError(f"cache must be a SimpleMMCACache of make_cache, got {type(cache).__name__}")
        check_input("t", t, self.dim)
        text = self.textual_self_attn(t, mask=text_mask, cache=cache.text)
        return text + self.cross_attn(text, cache=cache.visual)
