"""Multi-modal attention over two separate sequences, visual and textual."""

from typing import NamedTuple

import torch
from torch import nn

from ._heads import check_context, check_input, check_sizes
from .mgqa import MGQA


class SimpleMMCAOutput(NamedTuple):
    """visual (B, Nv, dim) and text (B, Nt, dim)."""

    visual: torch.Tensor
    text: torch.Tensor


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
        linear: linear attention; not built yet.

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

    def forward(self, v, t, visual_mask=None, text_mask=None):
        """Attend within and across the modalities.

        Args:
            v: visual tokens (B, Nv, dim).
            t: text tokens (B, Nt, dim).
            visual_mask: (B, Nv), True (or 1) = attend: padding of the visual tokens, as keys of both modalities.
            text_mask: (B, Nt), the same of the text.

        Returns:
            The named tuple (visual (B, Nv, dim), text (B, Nt, dim)).
        """
        check_input("v", v, self.dim)
        check_context("t", t, self.dim, "v", v)
        visual = self.visual_self_attn(v, mask=visual_mask)
        text = self.textual_self_attn(t, mask=text_mask)
        return SimpleMMCAOutput(visual, text + self.cross_attn(text, visual, context_mask=visual_mask))
