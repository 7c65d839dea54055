"""The table of what is measured. Sizes and goals are the CPU design's; a ratio is a peer's time over ours."""

from dataclasses import dataclass, field, replace

import torch

from mmca_ext import functional

from . import peers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EAGER_UP_TO = 2**23  # scores; beyond, and in 16 bits, eager code takes seconds a call


@dataclass
class Case:
    name: str
    ours: object  # (tensors) -> output or outputs
    peers: dict  # name -> the same work done otherwise
    shapes: tuple  # of query, key, value; or of a layer's inputs
    flops: float  # of the forward; 0: not counted
    goal: dict = field(default_factory=dict)  # peer -> (forward, backward) ratio aimed at; None: no goal
    dtype: torch.dtype = torch.float32
    random: bool = False  # results differ from call to call, and cannot be compared
    beside: dict = field(default_factory=dict)  # name -> other work, a yardstick timed in turn with ours, forward only
    backward: bool = True
    parameters: list = field(default_factory=list)  # whose gradients the backward gives too
    rounds: int = 7  # at least
    group: str = ""
    label: str = ""  # in the README, beside the size; default: the name
    size: str = ""

    def tensors(self):
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(shape, generator=generator).to(self.dtype).requires_grad_() for shape in self.shapes]


def heads_in_words(heads, kv_heads, dim):
    return f"{heads} heads of {dim}" if heads == kv_heads else f"{heads}/{kv_heads} heads of {dim}"


def attention(name, sizes, dtype="fp32", is_causal=False, dropout=0.0, goal=(None, None), beside=None, label=None):
    """sizes: batch, heads, kv_heads, q_len, k_len, dim. beside: name -> (call, the least ratio aimed at)."""
    batch, heads, kv_heads, q_len, k_len, dim = sizes
    calls = {"SDPA": lambda q, k, v: peers.sdpa(q, k, v, is_causal=is_causal, dropout_p=dropout)}
    if dtype == "fp32" and batch * heads * q_len * k_len <= EAGER_UP_TO:
        calls["eager"] = lambda q, k, v: peers.eager(q, k, v, is_causal, dropout)
    beside = beside or {}
    lengths = f"{q_len} tokens" if q_len == k_len else f"{q_len} {'row' if q_len == 1 else 'rows'}, {k_len} keys"
    return Case(
        name,
        lambda q, k, v: functional.attention(q, k, v, None, dropout, is_causal),
        calls,
        ((batch, heads, q_len, dim), (batch, kv_heads, k_len, dim), (batch, kv_heads, k_len, dim)),
        4 * batch * heads * dim * (q_len * k_len / 2 if is_causal else q_len * k_len),
        {"SDPA": goal, **{other: (least, None) for other, (_, least) in beside.items()}},
        DTYPES[dtype],
        dropout > 0,
        {other: call for other, (call, _) in beside.items()},
        label=label or dtype + ", causal" * is_causal + f", dropout {dropout}" * (dropout > 0),
        size=f"batch {batch}, {heads_in_words(heads, kv_heads, dim)}, {lengths}",
    )


def square(name, heads, length, dim, *arguments, **more):
    """Self-attention of one sample."""
    return attention(name, (1, heads, heads, length, length, dim), *arguments, **more)


def without_dropout(q, k, v):
    return functional.attention(q, k, v)


class InFloat32:
    """Ours on float32 tensors of the shapes it is given, made once."""

    def __init__(self):
        self.tensors = None

    def __call__(self, *tensors):
        if self.tensors is None:
            self.tensors = [tensor.detach().float() for tensor in tensors]
        return functional.attention(*self.tensors)


def plain_sum(q, k, v):
    """Reads keys and values once, as float32 numbers whatever they are: the least a decoding step must do."""
    return k.view(torch.float32).sum() + v.view(torch.float32).sum()


def decode(name, kv_heads, keys, dtype="fp32", goal=(None, None)):
    beside = {"a plain sum of K and V": (plain_sum, 0.9)}
    return attention(name, (1, 8, kv_heads, 1, keys, 64), dtype, goal=goal, beside=beside, label=f"{dtype}, one row")


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
        label="fp32, bias that the batch shares, with its gradient",
        size=f"batch {batch}, {heads} heads of {dim}, {length} tokens",
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
        label="packed, causal",
        size=f"{heads_in_words(heads, kv_heads, dim)}, {len(lengths)} sequences of {min(lengths)} to {max(lengths)}",
    )


def masked(kind, percent):
    """A boolean mask or key padding that hides about this many of the pairs, in runs as real masks do. SDPA computes
    them all the same, so the goal, 1.3 with nothing masked, grows as what is visible shrinks."""
    batch, heads, length, dim = 2, 8, 1024, 64
    kept = 1 - percent / 100
    if kind == "key padding":
        lengths = torch.tensor([int(length * kept * 1.2), int(length * kept * 0.8)])
        key_mask = torch.arange(length) < lengths[:, None]
        mask = key_mask[:, None, None, :]
        ours = lambda q, k, v: functional.attention(q, k, v, key_mask=key_mask)  # noqa: E731
    else:
        blocks = torch.rand(batch, 1, length // 64, length // 64, generator=torch.Generator().manual_seed(1)) < kept
        mask = blocks.repeat_interleave(64, 2).repeat_interleave(64, 3)
        mask |= torch.eye(length, dtype=torch.bool)
        ours = lambda q, k, v: functional.attention(q, k, v, attn_mask=mask)  # noqa: E731
    visible = mask.float().mean().item()
    return Case(
        f"{kind}, {percent}% masked",
        ours,
        {"SDPA": lambda q, k, v: peers.sdpa(q, k, v, attn_mask=mask)},
        ((batch, heads, length, dim),) * 3,
        4 * batch * heads * length * length * dim * visible,
        {"SDPA": (1.3 / visible, None)},
        beside={"ours, nothing masked": without_dropout},
        size=f"batch {batch}, {heads} heads of {dim}, {length} tokens",
    )


def mmca(name, image_rows, segments, goal=(None, None, None)):
    """goal: of eager, two masked SDPA, sliced SDPA, for either direction."""
    size = ", ".join(f"{kind} {length}" for kind, length in segments)
    segments = peers.Segments(segments)
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
        label=f'image_rows="{image_rows}"',
        size=f"{heads_in_words(heads, kv_heads, dim)}, {size}",
    )


INTERLEAVED = [("text", 64), ("image", 576), ("text", 128), ("image", 576), ("text", 256)]


def all_cases():
    from .layers import layer_cases  # which makes Cases

    within_5_percent = {"ours in fp32": (InFloat32(), 1 / 1.05)}
    within_15_percent = {"ours without dropout": (without_dropout, 1 / 1.15)}
    groups = {
        "Attention": [
            square("fp32 1024, D64", 8, 1024, 64, goal=(1.3, 1.4)),
            square("fp32 1024, D128", 8, 1024, 128, goal=(1.22, None)),
            square("fp32 4096, D64", 2, 4096, 64, goal=(1.3, 1.4)),
            square("fp32 causal 1024, D64", 8, 1024, 64, is_causal=True, goal=(1.9, 2.0)),
            square("fp32 causal 1024, D128", 8, 1024, 128, is_causal=True, goal=(1.75, None)),
            square("bf16 1024, D64", 8, 1024, 64, "bf16", goal=(1.4, 12), beside=within_5_percent),
            square("bf16 causal 1024, D64", 8, 1024, 64, "bf16", True, goal=(1.9, 17)),
            square("fp16 1024, D64", 8, 1024, 64, "fp16", goal=(2.3, 16)),
            square("fp16 causal 1024, D64", 8, 1024, 64, "fp16", True, goal=(3.2, 24)),
            square("dropout 0.1, fp32 1024, D64", 8, 1024, 64, dropout=0.1, goal=(11, None), beside=within_15_percent),
            bias("bias with gradient, 2 x 8 heads, 1024"),
        ],
        "Masks and packing": [
            *(masked(kind, percent) for kind in ("boolean mask", "key padding") for percent in (30, 50, 70)),
            packed("packed causal, 8 sequences of 5 to 1024"),
        ],
        "Short and cross": [
            attention("the documents' size: 32 x 8 heads, 10 tokens", (32, 8, 8, 10, 10, 64), goal=(7.0, 3.0)),
            attention("one number: 1 x 1 x 1 x 8", (1, 1, 1, 1, 1, 8)),
            *(
                attention(f"cross {dtype} 8 x 8 heads, 32 rows, 576 keys", (8, 8, 8, 32, 576, 64), dtype, goal=goal)
                for dtype, goal in (("fp32", (1.4, None)), ("bf16", (1.5, None)), ("fp16", (4.2, None)))
            ),
        ],
        "Decoding": [
            decode("decode 8/2 heads, 2k keys", 2, 2048, goal=(4.0, None)),
            decode("decode 8/8 heads, 2k keys", 8, 2048),
            decode("decode 8/2 heads, 16k keys", 2, 16384, goal=(4.0, None)),
            decode("decode bf16 8/2 heads, 2k keys", 2, 2048, "bf16", goal=(25, None)),
            decode("decode fp16 8/2 heads, 2k keys", 2, 2048, "fp16", goal=(50, None)),
        ],
        "MMCA": [
            mmca("MMCA self", "self", INTERLEAVED, goal=(65, 14, 2)),
            mmca("MMCA block", "block", INTERLEAVED, goal=(30, 6, 1.6)),
        ],
        "Whole layers": layer_cases(),
    }
    return [replace(case, group=group) for group, cases in groups.items() for case in cases]
