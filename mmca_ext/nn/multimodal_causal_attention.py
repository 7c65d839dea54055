"""Multi-modal causal attention over one interleaved sequence of text and image tokens."""

from torch import nn

from .. import functional, reference
from ..reference.mmca import IMAGE_ROWS, MERGES
from ._heads import (
    check_choice,
    check_dropout,
    check_heads,
    check_input,
    check_sizes,
    merge_heads,
    refuse_linear,
    split_heads,
)
from .mgqa import QK_NORM_SCALE, l2_normalised


class MultiModalCausalAttention(nn.Module):
    """MMCA of DeepSpeed-VisualChat (Yao et al., arXiv 2309.14327): text attends to the earlier text and to the earlier
    image tokens with a softmax each; image tokens attend as `image_rows` says. One projection for all tokens.

    Args:
        dim: features of x and of the result.
        heads: query heads; heads * dim_head need not be dim.
        kv_heads: key/value heads, a divisor of heads; None: as many as heads.
        dim_head: features per head, 1 to 256.
        dropout: probability of dropping an attention weight, in training only.
        image_rows: "self" (the paper: its own value), "block" (its whole image), "causal" (like text) or "self+text".
        merge: "sum" (the paper) or "lse" (one joint softmax: what weights trained with causal attention expect).
        qk_norm: l2-normalise queries and keys per head and score with scale 10, in place of 1 / sqrt(dim_head).
        linear: linear attention; not built yet.
        flash: False computes the same through `mmca_ext.reference`, readable and slow.

    Parameters: to_qkv.weight ((heads + 2 kv_heads) * dim_head rows: queries, keys, values), to_out.weight. No biases.

    Raises:
        ValueError, TypeError: at construction and at the call, naming the argument, its value and what is accepted.
    """

    def __init__(
        self,
        dim,
        heads,
        kv_heads=None,
        dim_head=64,
        dropout=0.0,
        image_rows="self",
        merge="sum",
        qk_norm=False,
        linear=False,
        flash=True,
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        check_sizes(dim=dim)
        check_heads(heads, kv_heads, dim_head)
        check_dropout(dropout)
        check_choice("image_rows", image_rows, IMAGE_ROWS)
        check_choice("merge", merge, MERGES)
        if merge not in ("sum", "lse"):
            raise NotImplementedError(
                f"merge={merge!r} is not built into the layer; mmca_ext.reference.mmca_attention has it"
            )
        refuse_linear(linear)
        self.dim, self.heads, self.kv_heads, self.dim_head = dim, heads, kv_heads, dim_head
        self.dropout, self.image_rows, self.merge = dropout, image_rows, merge
        self.qk_norm, self.flash = qk_norm, flash
        self.to_qkv = nn.Linear(dim, (heads + 2 * kv_heads) * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x, modality, image_id=None):
        """Attend within one interleaved sequence.

        Args:
            x: (B, N, dim).
            modality: integers (B, N): 0 padding, 1 text, 2 and above image.
            image_id: integers (B, N), tells neighbouring images apart for image_rows="block".

        Returns:
            (B, N, dim); 0 for padding.
        """
        check_input("x", x, self.dim)
        heads = split_heads(self.to_qkv(x), self.heads + 2 * self.kv_heads)
        query, key, value = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        scale = None
        if self.qk_norm:
            query, key = l2_normalised(query, key, value)
            scale = QK_NORM_SCALE
        out = (functional if self.flash else reference).mmca_attention(
            query,
            key,
            value,
            modality,
            image_rows=self.image_rows,
            merge=self.merge,
            image_id=image_id,
            dropout_p=self.dropout if self.training else 0.0,
            scale=scale,
        )
        return self.to_out(merge_heads(out))

    def extra_repr(self):
        return (
            f"dim={self.dim}, heads={self.heads}, kv_heads={self.kv_heads}, dim_head={self.dim_head}, "
            f"dropout={self.dropout}, image_rows={self.image_rows!r}, merge={self.merge!r}, flash={self.flash}"
        )
