"""The table of what is measured. Sizes are those of the design goals for CPUs; a row is a peer's time over ours."""

from dataclasses import dataclass, field

import torch

import mmca_ext
from mmca_ext import functional

from . import peers


@dataclass
class Case:
    name: str
    ours: object  # (tensors) -> output
    peers: dict  # name -> (tensors) -> output
    shapes: tuple  # of query, key, value; or of a layer's inputs
    flops: float  # of the forward; 0: not counted
    goal: dict = field(default_factory=dict)  # peer -> (forward, backward) ratio aimed at; None: no goal
    dtype: torch.dtype = torch.float32
    random: bool = False  # results differ from call to call, and cannot be compared

    def tensors(self):
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(shape, generator=generator).to(self.dtype).requires_grad_() for shape in self.shapes]


def attention(
    name,
    batch,
    heads,
    kv_heads,
    q_len,
    k_len,
    dim,
    is_causal=False,
    goal=(None, None),
    dtype=torch.float32,
    dropout=0.0,
):
    pairs = q_len * k_len / 2 if is_causal else q_len * k_len
    return Case(
        name,
        lambda q, k, v: functional.attention(q, k, v, None, dropout, is_causal),
        {"SDPA": lambda q, k, v: peers.sdpa(q, k, v, is_causal=is_causal, dropout_p=dropout)},
        ((batch, heads, q_len, dim), (batch, kv_heads, k_len, dim), (batch, kv_heads, k_len, dim)),
        4 * batch * heads * pairs * dim,
        {"SDPA": goal},
        dtype,
        dropout > 0,
    )


def bias(name):
    """A bias that every sample of the batch shares, and its gradient."""
    batch, heads, length, dim = 2, 8, 1024, 64
    shape = (batch, heads, length, dim)
    return Case(
        name,
        lambda q, k, v, b: functional.attention(q, k, v, b),
        {"SDPA": lambda q, k, v, b: peers.sdpa(q, k, v, attn_mask=b)},
        (shape, shape, shape, (1, heads, length, length)),
        4 * batch * heads * length * length * dim,
    )


def packed(name):
    """Sequences of unequal length behind one another, causal; what users without packing write."""
    lengths, heads, kv_heads, dim = [1024, 96, 512, 33, 700, 256, 5, 384], 8, 2, 64
    sequences = peers.Sequences(lengths)
    return Case(
        name,
        lambda q, k, v: functional.attention(
            q, k, v, is_causal=True, cu_seqlens_q=sequences.offsets, cu_seqlens_k=sequences.offsets
        ),
        {
            "SDPA per sequence": lambda q, k, v: peers.sdpa_per_sequence(q, k, v, sequences),
            "padded SDPA": lambda q, k, v: peers.sdpa_padded(q, k, v, sequences),
        },
        ((sum(lengths), heads, dim), *((sum(lengths), kv_heads, dim),) * 2),
        2 * heads * dim * sum(length**2 for length in lengths),
    )


def masked(name, kept, padding, goal=(None, None)):
    """A boolean mask (or key padding) that keeps about `kept` of the keys, in runs as real masks have them."""
    batch, heads, length, dim = 2, 8, 1024, 64
    generator = torch.Generator().manual_seed(1)
    if padding:
        lengths = torch.tensor([int(length * kept * 1.2), int(length * kept * 0.8)])
        key_mask = torch.arange(length) < lengths[:, None]
        ours = lambda q, k, v: functional.attention(q, k, v, key_mask=key_mask)  # noqa: E731
        mask = key_mask[:, None, None, :]
    else:
        blocks = torch.rand(batch, 1, length // 64, length // 64, generator=generator) < kept
        mask = blocks.repeat_interleave(64, 2).repeat_interleave(64, 3)
        mask |= torch.eye(length, dtype=torch.bool)
        ours = lambda q, k, v: functional.attention(q, k, v, attn_mask=mask)  # noqa: E731
    shape = (batch, heads, length, dim)
    return Case(
        name, ours, {"SDPA": lambda q, k, v: peers.sdpa(q, k, v, attn_mask=mask)}, (shape,) * 3, 0, {"SDPA": goal}
    )


def mmca(name, image_rows, goal):
    segments = peers.Segments([("text", 64), ("image", 576), ("text", 128), ("image", 576), ("text", 256)])
    heads, kv_heads, dim = 8, 2, 64
    modality = segments.modality[None]
    visible = sum(int(mask.sum()) for mask in segments.masks(image_rows))
    return Case(
        name,
        lambda q, k, v: functional.mmca_attention(q, k, v, modality, image_rows=image_rows),
        {
            peer: lambda q, k, v, call=call: call(q, k, v, segments, image_rows)
            for peer, call in peers.MMCA_PEERS.items()
        },
        ((1, heads, segments.length, dim), *((1, kv_heads, segments.length, dim),) * 2),
        4 * heads * visible * dim,
        {peer: (target, target) for peer, target in zip(peers.MMCA_PEERS, goal, strict=True)},
    )


def layer():
    """MultiModalCrossAttention against the same parameters around SDPA."""
    torch.manual_seed(0)
    ours = mmca_ext.MultiModalCrossAttention(512, 8, 768, dropout=0.0)

    def with_sdpa(x, context):
        query, key, value = ours.to_q(x), ours.to_k(context), ours.to_v(context)
        query, key, value = (t.unflatten(-1, (8, 64)).transpose(1, 2) for t in (query, key, value))
        return ours.to_out(peers.sdpa(query, key, value).transpose(1, 2).flatten(2))

    return Case(
        "layer MultiModalCrossAttention, 128 rows, 576 keys",
        ours,
        {"SDPA": with_sdpa},
        ((4, 128, 512), (4, 576, 768)),
        0,
    )


def all_cases():
    return [
        attention("fp32 1024, D64", 1, 8, 8, 1024, 1024, 64, goal=(1.3, 1.4)),
        attention("fp32 1024, D128", 1, 8, 8, 1024, 1024, 128, goal=(1.22, None)),
        attention("fp32 4096, D64", 1, 2, 2, 4096, 4096, 64, goal=(1.3, 1.4)),
        attention("fp32 causal 1024, D64", 1, 8, 8, 1024, 1024, 64, True, goal=(1.9, 2.0)),
        attention("fp32 causal 1024, D128", 1, 8, 8, 1024, 1024, 128, True, goal=(1.75, None)),
        attention("bf16 1024, D64", 1, 8, 8, 1024, 1024, 64, goal=(1.4, 12), dtype=torch.bfloat16),
        attention("bf16 causal 1024, D64", 1, 8, 8, 1024, 1024, 64, True, goal=(1.9, 17), dtype=torch.bfloat16),
        attention("fp16 1024, D64", 1, 8, 8, 1024, 1024, 64, goal=(2.3, 16), dtype=torch.float16),
        attention("fp16 causal 1024, D64", 1, 8, 8, 1024, 1024, 64, True, goal=(3.2, 24), dtype=torch.float16),
        attention("dropout 0.1, fp32 1024, D64", 1, 8, 8, 1024, 1024, 64, goal=(11, None), dropout=0.1),
        bias("bias with gradient, 2 x 8 heads, 1024"),
        packed("packed causal, 8 sequences of 5 to 1024"),
        attention("the documents' size: 32 x 8 heads, 10 tokens", 32, 8, 8, 10, 10, 64, goal=(7.0, 3.0)),
        attention("cross 8 x 8 heads, 32 rows, 576 keys", 8, 8, 8, 32, 576, 64, goal=(1.4, None)),
        attention("decode 8/2 heads, 2k keys", 1, 8, 2, 1, 2048, 64, goal=(4.0, None)),
        attention("decode 8/8 heads, 2k keys", 1, 8, 8, 1, 2048, 64),
        attention("decode 8/2 heads, 16k keys", 1, 8, 2, 1, 16384, 64, goal=(4.0, None)),
        attention("one number: 1 x 1 x 1 x 8", 1, 1, 1, 1, 1, 8),
        masked("boolean mask, 50% visible", 0.5, padding=False, goal=(1.3, None)),
        masked("key padding, 50% visible", 0.5, padding=True, goal=(1.3, None)),
        mmca("MMCA self", "self", (65, 14, 2)),
        mmca("MMCA block", "block", (30, 6, 1.6)),
        layer(),
    ]
