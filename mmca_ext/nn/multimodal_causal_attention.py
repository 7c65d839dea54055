"""Multi-modal causal attention over one interleaved sequence of text and image tokens."""

import torch
from torch import nn

from .. import functional, reference
from ..reference.mmca import IMAGE_ROWS
from ._heads import (
    check_choice,
    check_dropout,
    check_heads,
    check_ids,
    check_input,
    check_sizes,
    check_softcap,
    merge_heads,
    split_heads,
)
from ._packed import check_packing
from .kv_cache import check_cache
from .linear import attend, check_linear, check_linear_cache, check_modality, images_to_themselves
from .mgqa import QK_NORM_SCALE, l2_normalised
from .rotary import check_rotary, rotate_heads

MERGES = ("sum", "lse", "gate")  # functional's "none" gives two results, and a layer one


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
        merge: "sum" (the paper), "lse" (one joint softmax: what weights trained with causal attention expect) or
            "gate": tanh(image_gate) weighs the image term of text rows, per query head. It starts at 0, where text rows
            are those of the language model alone: the gated cross-attention of Flamingo (arXiv 2204.14198, section
            2.2), also in Llama 3.2. Image rows, whose image term is their own output, are not gated.
        qk_norm: l2-normalise queries and keys per head and score with scale 10, in place of 1 / sqrt(dim_head).
        linear: linear attention (Katharopoulos et al. 2020, arXiv 2006.16236) in place of both softmaxes: each group's
            output is an average of its own, with weights phi(q) . phi(k). All image_rows keep their meaning, and a
            LinearCache takes the KVCache's place. Dropout then acts on the heads' output. qk_norm, softcap, rotary and
            merge="lse", which speak of scores, do not go with it.
        flash: False computes the same through `mmca_ext.reference`, readable and slow.
        softcap: s = softcap * tanh(s / softcap) bounds the scores; None: no bound.
        rotary: a RotaryEmbedding of dim_head features, for queries and keys.

    Parameters: to_qkv.weight ((heads + 2 kv_heads) * dim_head rows: queries, keys, values), to_out.weight, with
    merge="gate" image_gate (heads,). No biases.

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
        *,
        softcap=None,
        rotary=None,
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        check_sizes(dim=dim)
        check_heads(heads, kv_heads, dim_head)
        check_dropout(dropout)
        check_choice("image_rows", image_rows, IMAGE_ROWS)
        check_choice("merge", merge, MERGES)
        check_softcap(softcap)
        check_rotary(rotary, dim_head)
        check_linear(linear, qk_norm=qk_norm, softcap=softcap, rotary=rotary is not None)
        if linear and merge == "lse":
            raise ValueError('merge="lse" is one joint softmax, and does not go with linear=True: "sum" or "gate"')
        self.dim, self.heads, self.kv_heads, self.dim_head = dim, heads, kv_heads, dim_head
        self.dropout, self.image_rows, self.merge = dropout, image_rows, merge
        self.qk_norm, self.flash, self.softcap, self.rotary, self.linear = qk_norm, flash, softcap, rotary, linear
        self.to_qkv = nn.Linear(dim, (heads + 2 * kv_heads) * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        if merge == "gate":
            self.image_gate = nn.Parameter(torch.zeros(heads))

    def forward(self, x, modality, image_id=None, *, positions=None, cu_seqlens=None, max_seqlen=None, cache=None):
        """Attend within one interleaved sequence.

        Args:
            x: (B, N, dim), or sequences packed into (T, dim) with cu_seqlens.
            modality: integers (B, N) or (T,): 0 padding, 1 text, 2 and above image.
            image_id: integers like modality, tells neighbouring images apart for image_rows="block".
            positions: of x's tokens, for rotary: see RotaryEmbedding.table, which may be given in their place. By
                default 0, 1, 2, ... in each sequence, or on from the cache's tokens, padding included.
            cu_seqlens: int32 or int64 (S + 1,) offsets of S packed sequences, each attending to itself.
            max_seqlen: an upper bound on the packed lengths.
            cache: a KVCache; for linear=True a LinearCache. x and modality are then those of the tokens that follow the
                ones in it: they are appended, and get the rows that a call on the whole sequence would give them. With
                image_rows="block", whose rows see later tokens, an image must come in one call.

        Returns:
            (B, N, dim) or (T, dim); 0 for padding.
        """
        check_packing(cu_seqlens, {"max_seqlen": max_seqlen}, {"cache": cache})
        check_input("x", x, self.dim, packed=cu_seqlens is not None)
        check_ids("modality", modality, x)
        if image_id is not None:
            check_ids("image_id", image_id, x)
        if cache is not None:
            if self.linear:
                check_linear_cache(cache, x.shape[0], self.kv_heads, self.dim_head, groups=2)
            else:
                check_cache(cache, x.shape[0], self.kv_heads, self.dim_head)
            self._check_images_whole(modality, image_id, cache)
        heads = split_heads(self.to_qkv(x), self.heads + 2 * self.kv_heads)
        query, key, value = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if self.qk_norm:
            query, key = l2_normalised(query), l2_normalised(key)
        query, key = rotate_heads(self.rotary, query, key, positions, cu_seqlens, cache)
        gate = self._gate(modality) if self.merge == "gate" else None
        if self.linear:
            if positions is not None:
                raise ValueError("positions are for rotary, and the layer has none")
            out = self._linear(query, key, value, modality, image_id, gate, cu_seqlens, cache)
            return self.to_out(merge_heads(out))
        if cache is not None:
            cache.append(key, value, modality, image_id)
            key, value, modality = cache.keys, cache.values, cache.modality
            image_id = cache.image_id if self.image_rows == "block" else None
        out = (functional if self.flash else reference).mmca_attention(
            query,
            key,
            value,
            modality,
            image_rows=self.image_rows,
            merge=self.merge,
            gate=gate,
            image_id=image_id,
            dropout_p=self.dropout if self.training else 0.0,
            scale=QK_NORM_SCALE if self.qk_norm else None,
            softcap=self.softcap,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
        )
        return self.to_out(merge_heads(out))

    def _linear(self, query, key, value, modality, image_id, gate, cu_seqlens, cache):
        """A call for each key group, and what image rows have of their own."""
        check_modality(modality)
        offsets = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
        masks = modality == 1, modality >= 2
        if cache is None:
            text, image = (attend(self, query, key, value, True, key_mask=mask, **offsets) for mask in masks)
        else:
            (text, image), states = zip(
                *(
                    attend(self, query, key, value, True, keep=True, key_mask=mask, state=state)
                    for mask, state in zip(masks, cache.states, strict=True)
                ),
                strict=True,
            )

        def of_rows(rows):  # booleans (B, N) or (T,) beside (B, Hq, N, D) or (T, Hq, D)
            return rows.unsqueeze(1).unsqueeze(-1) if rows.dim() == 2 else rows[:, None, None]

        is_image, real = of_rows(modality >= 2), modality != 0
        if cu_seqlens is not None:  # what lies past the last offset is no token
            real = real & (torch.arange(len(real), device=real.device) < cu_seqlens[-1])
        if self.image_rows in ("self", "self+text"):
            own = value.repeat_interleave(self.heads // self.kv_heads, 1)
            image = torch.where(is_image, own, image)
        elif self.image_rows == "block":
            image = torch.where(
                is_image, images_to_themselves(self, query, key, value, modality, image_id, cu_seqlens), image
            )
        if self.image_rows in ("self", "block"):
            text = text.masked_fill(is_image, 0.0)
        if cache is not None:
            ids = modality if image_id is None else image_id
            last = modality[:, -1:].clone(), ids[:, -1:].clone()
            cache.advance(states, modality.shape[1], last)
        out = text + image if gate is None else gate[..., :1] * text + gate[..., 1:] * image
        return out.to(query.dtype).masked_fill(~of_rows(real), 0.0)

    def _gate(self, modality):
        """Weights of text and image term, (B, Hq, N, 2) or (T, Hq, 2): all 1 but that of the image in text rows."""
        weight = self.image_gate.tanh()
        image_row = modality.unsqueeze(1) >= 2
        if modality.dim() == 2:
            weight = weight.unsqueeze(1)
        weight = torch.where(image_row, 1.0, weight)
        return torch.stack((torch.ones_like(weight), weight), dim=-1)

    def _check_images_whole(self, modality, image_id, cache):
        """Rows of the cache's last image cannot see tokens that come now. Looked at where it waits for no device."""
        if self.image_rows != "block" or not cache.length or modality.device.type != "cpu":
            return
        if torch.compiler.is_compiling() or not modality.shape[1]:
            return
        ids = modality if image_id is None else image_id
        before, image_before = cache.last_ids if self.linear else (cache.modality, cache.image_id)
        continued = (image_before[:, -1] == ids[:, 0]) & (before[:, -1] >= 2) & (modality[:, 0] >= 2)
        if bool(continued.any()):
            raise ValueError(
                f"modality goes on with the image that ends the cache (sequence {int(continued.int().argmax())}), but "
                'under image_rows="block" its earlier rows would see these tokens: append an image in one call, or '
                "tell two images apart by image_id"
            )

    def extra_repr(self):
        return (
            f"dim={self.dim}, heads={self.heads}, kv_heads={self.kv_heads}, dim_head={self.dim_head}, "
            f"dropout={self.dropout}, image_rows={self.image_rows!r}, merge={self.merge!r}, flash={self.flash}, "
            f"linear={self.linear}"
        )
