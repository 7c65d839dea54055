"""What a user would write without this library: the peers our operators are measured against.

MMCA here is the sum of two softmaxes (text keys, image keys), arXiv 2309.14327; image rows keep their own value
("self") or attend within their image ("block"). All peers return the same numbers: checked before they are timed.
"""

import torch
import torch.nn.functional as F


def sdpa(query, key, value, is_causal=False, attn_mask=None, dropout_p=0.0):
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def eager(query, key, value, is_causal=False, dropout_p=0.0):
    """As research code writes it: einsum, masked_fill, softmax, on scores that are all kept. Causal bottom-right."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.einsum("bhid,bhjd->bhij", query, key) * query.shape[-1] ** -0.5
    if is_causal:
        rows, columns = scores.shape[-2:]
        hidden = torch.ones(rows, columns, dtype=torch.bool).triu(columns - rows + 1)
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    return torch.einsum("bhij,bhjd->bhid", F.dropout(scores.softmax(-1), dropout_p), value)


class Sequences:
    """Packed sequences: their offsets, and where each token lies in a padded batch."""

    def __init__(self, lengths):
        self.lengths = torch.tensor(lengths)
        self.offsets = F.pad(self.lengths.cumsum(0), (1, 0))
        self.present = torch.arange(max(lengths)) < self.lengths[:, None]  # (B, longest)
        self.place = self.present.flatten().nonzero()[:, 0]
        self.mask = torch.ones(max(lengths), max(lengths), dtype=torch.bool).tril() & self.present[:, None, None, :]


def sdpa_per_sequence(query, key, value, sequences):
    """(T, H, D) tensors, one causal call a sequence."""
    parts = []
    for begin, end in zip(sequences.offsets[:-1].tolist(), sequences.offsets[1:].tolist(), strict=True):
        q, k, v = (t[begin:end].transpose(0, 1)[None] for t in (query, key, value))
        parts.append(sdpa(q, k, v, is_causal=True)[0].transpose(0, 1))
    return torch.cat(parts)


def sdpa_padded(query, key, value, sequences):
    """(T, H, D) tensors, padded to the longest sequence and back, with a mask."""
    batch, longest = sequences.present.shape

    def pad(t):
        padded = t.new_zeros(batch * longest, *t.shape[1:]).index_copy(0, sequences.place, t)
        return padded.unflatten(0, (batch, longest)).transpose(1, 2)

    out = sdpa(pad(query), pad(key), pad(value), attn_mask=sequences.mask)
    return out.transpose(1, 2).flatten(0, 1)[sequences.place]


class Segments:
    """An interleaved sequence, e.g. [("text", 64), ("image", 576)], with the masks and slices the peers need."""

    def __init__(self, segments):
        self.segments = segments
        kinds, starts, position = [], [], 0
        for kind, length in segments:
            starts.append(position)
            kinds += [1 if kind == "text" else 2] * length
            position += length
        self.length, self.starts = position, starts
        self.modality = torch.tensor(kinds)
        image = torch.zeros(position, dtype=torch.long)
        for index, (start, (_, length)) in enumerate(zip(starts, segments, strict=True)):
            image[start : start + length] = index
        causal = torch.ones(position, position, dtype=torch.bool).tril()
        text = self.modality == 1
        self.text_rows, self.image_rows = text.nonzero()[:, 0], (~text).nonzero()[:, 0]
        self.text_mask = causal & text & text[:, None]
        self.image_mask = causal & ~text & text[:, None]
        self.self_mask = torch.eye(position, dtype=torch.bool) & ~text
        self.block_mask = (image == image[:, None]) & ~text & ~text[:, None]

    def masks(self, image_rows):
        return self.text_mask, self.image_mask | (self.self_mask if image_rows == "self" else self.block_mask)


def mmca_eager(query, key, value, segments, image_rows):
    """The two-softmax form as research code writes it, like `eager`."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.einsum("bhid,bhjd->bhij", query, key) * query.shape[-1] ** -0.5
    out = 0
    for mask in segments.masks(image_rows):
        weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~mask, 0.0)
        out = out + torch.einsum("bhij,bhjd->bhid", weights, value)
    return out


def mmca_two_masked(query, key, value, segments, image_rows):
    """Two masked SDPA calls; rows that see nothing of a group are NaN there and set to zero."""
    out = 0
    for mask in segments.masks(image_rows):
        part = sdpa(query, key, value, attn_mask=mask)
        out = out + torch.where(mask.any(-1)[:, None], part, 0.0)
    return out


def mmca_sliced(query, key, value, segments, image_rows):
    """The best one can do by hand: text rows gathered and causal, image keys cut per segment, images unmasked."""
    rows = segments.text_rows
    text = sdpa(query[:, :, rows], key[:, :, rows], value[:, :, rows], is_causal=True)
    image_keys, image_values = key[:, :, segments.image_rows], value[:, :, segments.image_rows]
    parts, done, seen = [], 0, 0
    for start, (kind, length) in zip(segments.starts, segments.segments, strict=True):
        part = slice(start, start + length)
        if kind == "text":
            piece = text[:, :, done : done + length]
            if seen:
                piece = piece + sdpa(query[:, :, part], image_keys[:, :, :seen], image_values[:, :, :seen])
            done += length
        else:
            seen += length
            if image_rows == "self":
                piece = value[:, :, part].repeat_interleave(query.shape[1] // key.shape[1], 1)
            else:
                piece = sdpa(query[:, :, part], key[:, :, part], value[:, :, part])
        parts.append(piece)
    return torch.cat(parts, 2)


MMCA_PEERS = {"eager": mmca_eager, "two masked SDPA": mmca_two_masked, "sliced SDPA": mmca_sliced}


def phi(x):
    return F.elu(x) + 1


def linear_products(query, key, value):
    """Linear attention that is not causal: two products."""
    query, key = phi(query), phi(key)
    normal = query @ key.sum(2)[..., None]
    return query @ (key.transpose(2, 3) @ value) / normal


def linear_cumulative(query, key, value):
    """Causal linear attention as its formula reads: the sum of outer products up to every token, all of them kept."""
    query, key = phi(query), phi(key)
    sums = torch.einsum("bhld,bhle->bhlde", key, value).cumsum(2)
    normal = (query * key.cumsum(2)).sum(-1, keepdim=True)
    return torch.einsum("bhld,bhlde->bhle", query, sums) / normal


def linear_chunked(query, key, value, chunk=128):
    """Causal linear attention in chunks, all at once: scores within a chunk, a sum of outer products before it."""
    query, key, value = (t.unflatten(2, (-1, chunk)) for t in (phi(query), phi(key), value))
    sums, normals = key.transpose(3, 4) @ value, key.sum(3)
    scores = (query @ key.transpose(3, 4)).tril()
    out = scores @ value + query @ (sums.cumsum(2) - sums)
    normal = scores.sum(-1, keepdim=True) + query @ (normals.cumsum(2) - normals)[..., None]
    return (out / normal).flatten(2, 3)
