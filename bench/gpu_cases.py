"""What is measured on a GPU: shapes of today's models in bfloat16, our own operators beside every way torch has to do
the same work there. Goals are ratios to the best of those in the same run."""

import functools
from dataclasses import dataclass, field

import torch
import torch._dynamo.config
import torch._functorch.config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from mmca_ext import functional

from . import peers

BACKENDS = {
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SCORES_KEPT_UP_TO = 2**28  # beyond, what materialises them is not asked


@dataclass
class Work:
    name: str
    group: str
    ours: object  # (tensors) -> output
    peers: dict  # name -> the same
    shapes: tuple  # of query, key, value (and a bias)
    dtype: str
    flops: float  # of the forward, visible pairs only
    bytes: float = 0.0  # the least that a forward must move; 0: arithmetic is the limit
    goal: tuple = (None, None)  # the best peer's time over ours, forward and backward
    backward: bool = True
    random: bool = False  # results differ from call to call
    per_call: bool = False  # what a call costs, host included, rather than what the GPU takes
    inputs: dict = field(default_factory=dict)  # what else the calls share, for tests

    def tensors(self, device):
        generator = torch.Generator(device).manual_seed(0)
        return [
            torch.randn(shape, generator=generator, device=device).to(DTYPES[self.dtype]).requires_grad_(self.backward)
            for shape in self.shapes
        ]


def on_backend(backend, call):
    def run(*tensors):
        with sdpa_kernel(backend):
            return call(*tensors)

    return run


def all_backends(call):
    return {name: on_backend(backend, call) for name, backend in BACKENDS.items()}


@functools.cache
def compiled_flex():
    torch._dynamo.config.recompile_limit = 64  # every shape and mask is a compilation of its own
    torch._functorch.config.donated_buffer = False  # a backward is run again and again
    return torch.compile(flex_attention, dynamic=False)


def flex(q, k, v, block_mask=None):
    return compiled_flex()(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])


def visible_pairs(q_len, k_len, is_causal, left=None):
    if not is_causal:
        return q_len * k_len
    return sum(min(i + 1 + k_len - q_len, k_len if left is None else left + 1) for i in range(q_len))


class Cases:
    """Builders of Work for one device; lengths are divided by `shrink`, for a dry run."""

    def __init__(self, device, shrink=1):
        self.device, self.shrink = device, shrink

    def length(self, n):
        return max(1, n // self.shrink)

    def attention(
        self, name, sizes, dtype="bf16", is_causal=False, with_flex=False, dropout=0.0, group="Attention", **more
    ):
        batch, heads, kv_heads, q_len, k_len, dim = sizes
        q_len, k_len = self.length(q_len), self.length(k_len)
        calls = all_backends(lambda q, k, v: peers.sdpa(q, k, v, is_causal=is_causal, dropout_p=dropout))
        if with_flex:
            block_mask = self.block_mask(lambda b, h, i, j: j <= i, q_len, k_len) if is_causal else None
            calls["FlexAttention"] = lambda q, k, v: flex(q, k, v, block_mask)
        if batch * heads * q_len * k_len <= SCORES_KEPT_UP_TO:
            calls["SDPA math"] = on_backend(
                SDPBackend.MATH, lambda q, k, v: peers.sdpa(q, k, v, is_causal=is_causal, dropout_p=dropout)
            )
        return Work(
            name,
            group,
            lambda q, k, v: functional.attention(q, k, v, None, dropout, is_causal),
            calls,
            ((batch, heads, q_len, dim), *((batch, kv_heads, k_len, dim),) * 2),
            dtype,
            4.0 * batch * heads * dim * visible_pairs(q_len, k_len, is_causal),
            random=dropout > 0,
            **more,
        )

    def decode(self, batch, keys):
        heads, kv_heads, dim = 32, 8, 128
        work = self.attention(
            f"decode, batch {batch}, {keys} keys",
            (batch, heads, kv_heads, self.shrink, keys, dim),  # one row, however lengths shrink
            group="Decoding, 32/8 heads of 128",
            backward=False,
            goal=(1.0, None),
        )
        work.bytes = 2.0 * 2 * batch * kv_heads * self.length(keys) * dim
        return work

    def window(self, length, left):
        length, left = self.length(length), self.length(left)
        block_mask = self.block_mask(lambda b, h, i, j: (j <= i) & (i - j <= left), length, length)
        return Work(
            f"window of {left} before, {length} tokens, D128",
            "Masks",
            lambda q, k, v: functional.attention(q, k, v, is_causal=True, window=(left, None)),
            {"FlexAttention": lambda q, k, v: flex(q, k, v, block_mask)},
            ((1, 32, length, 128), *((1, 8, length, 128),) * 2),
            "bf16",
            4.0 * 32 * 128 * visible_pairs(length, length, True, left),
        )

    def masked(self, length):
        length = self.length(length)
        size = max(1, length // 16)
        blocks = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(1)) < 0.5
        mask = blocks.repeat_interleave(size, 2).repeat_interleave(size, 3)[:, :, :length, :length]
        mask = (mask | torch.eye(length, dtype=torch.bool)).to(self.device)
        return Work(
            f"boolean mask, half hidden, {length} tokens, D128",
            "Masks",
            lambda q, k, v: functional.attention(q, k, v, mask),
            all_backends(lambda q, k, v: peers.sdpa(q, k, v, attn_mask=mask)),
            ((1, 16, length, 128),) * 3,
            "bf16",
            4.0 * 16 * 128 * length * length,
        )

    def bias(self, length):
        length = self.length(length)
        return Work(
            f"bias that the batch shares, with its gradient, {length} tokens, D64",
            "Masks",
            lambda q, k, v, b: functional.attention(q, k, v, b),
            all_backends(lambda q, k, v, b: peers.sdpa(q, k, v, attn_mask=b)),
            (*((2, 16, length, 64),) * 3, (1, 16, length, length)),
            "bf16",
            4.0 * 2 * 16 * 64 * length * length,
        )

    def packed(self):
        lengths = [self.length(n) for n in (4096, 384, 2048, 132, 2800, 1024, 20, 1536)]
        sequences = peers.Sequences(lengths)
        for name in ("offsets", "place", "mask"):
            setattr(sequences, name, getattr(sequences, name).to(self.device))
        offsets = sequences.offsets
        tokens = sum(lengths)
        return Work(
            f"packed causal, {len(lengths)} sequences of {min(lengths)} to {max(lengths)}, D128",
            "Masks",
            lambda q, k, v: functional.attention(q, k, v, is_causal=True, cu_seqlens_q=offsets, cu_seqlens_k=offsets),
            {"padded SDPA": lambda q, k, v: peers.sdpa_padded(q, k, v, sequences)},
            ((tokens, 32, 128), *((tokens, 8, 128),) * 2),
            "bf16",
            4.0 * 32 * 128 * sum(visible_pairs(n, n, True) for n in lengths),
        )

    def mmca(self, image_rows, batch, times):
        """`times` repetitions of text around two images; the peers of the CPU's table, and two FlexAttention calls."""
        pattern = [("text", 64), ("image", 576), ("text", 128), ("image", 576), ("text", 256)] * times
        segments = peers.Segments([(kind, self.length(n)) for kind, n in pattern])
        for name in ("modality", "text_rows", "image_rows", "text_mask", "image_mask", "self_mask", "block_mask"):
            setattr(segments, name, getattr(segments, name).to(self.device))
        heads, kv_heads, dim, length = 32, 8, 128, segments.length
        modality = segments.modality.expand(batch, length)
        masks = segments.masks(image_rows)
        blocks = [self.block_mask(lambda b, h, i, j, mask=mask: mask[i, j], length, length) for mask in masks]

        def two_flex(q, k, v):
            return flex(q, k, v, blocks[0]) + flex(q, k, v, blocks[1])

        calls = {
            "sliced SDPA": lambda q, k, v: peers.mmca_sliced(q, k, v, segments, image_rows),
            "two masked SDPA": lambda q, k, v: peers.mmca_two_masked(q, k, v, segments, image_rows),
            "two FlexAttention": two_flex,
        }
        if batch * heads * length * length <= SCORES_KEPT_UP_TO:
            calls["eager"] = lambda q, k, v: peers.mmca_eager(q, k, v, segments, image_rows)
        return Work(
            f"MMCA {image_rows}, batch {batch}, {length} tokens",
            "MMCA, 32/8 heads of 128",
            lambda q, k, v: functional.mmca_attention(q, k, v, modality, image_rows=image_rows),
            calls,
            ((batch, heads, length, dim), *((batch, kv_heads, length, dim),) * 2),
            "bf16",
            4.0 * batch * heads * dim * float(sum(int(mask.sum()) for mask in masks)),
            goal=(3.0, 3.0),
        )

    def linear(self, batch, heads, length, dim, is_causal, dtype="bf16"):
        """What must be moved at the least: q, k, v and the output, once."""
        length = max(128, self.length(length))  # a chunk of the peer's
        peer = ("torch, chunked", peers.linear_chunked) if is_causal else ("torch", peers.linear_products)
        return Work(
            f"linear{' causal' * is_causal}, {dtype}, batch {batch}, {heads} heads of {dim}, {length} tokens",
            "Linear attention",
            lambda q, k, v: functional.linear_attention(q, k, v, is_causal),
            dict([peer]),
            ((batch, heads, length, dim),) * 3,
            dtype,
            4.0 * batch * heads * length * dim * dim,
            bytes=4.0 * batch * heads * length * dim * DTYPES[dtype].itemsize,
        )

    def block_mask(self, mask_mod, q_len, k_len):
        return create_block_mask(mask_mod, None, None, q_len, k_len, device=self.device)

    def all(self):
        for length in (2048, 8192, 16384):
            for is_causal in (False, True):
                yield self.attention(
                    f"D128 {length}{' causal' * is_causal}, 64/8 heads",
                    (1, 64, 8, length, length, 128),
                    is_causal=is_causal,
                    with_flex=length == 8192,
                    goal=(1.0, 1.0),
                )
        for is_causal in (False, True):
            yield self.attention(
                f"D64 8192{' causal' * is_causal}, 32 heads",
                (1, 32, 32, 8192, 8192, 64),
                is_causal=is_causal,
                goal=(1.0, 1.0),
            )
        yield self.attention("fp16 D128 4096, 32/8 heads", (1, 32, 8, 4096, 4096, 128), "fp16")
        yield self.attention("D256 4096 causal, 16 heads", (1, 16, 16, 4096, 4096, 256), is_causal=True)
        yield self.attention("dropout 0.1, D128 2048 causal", (2, 32, 32, 2048, 2048, 128), is_causal=True, dropout=0.1)
        for dim in (64, 128):
            yield self.attention(f"fp32 D{dim} 2048, 16 heads", (2, 16, 16, 2048, 2048, dim), "fp32", goal=(1.5, 1.5))
        yield self.mmca("self", 4, 1)
        yield self.mmca("block", 4, 1)
        yield self.mmca("self", 1, 4)
        for rows, keys in ((512, 576), (2048, 4096)):
            yield self.attention(
                f"cross, batch 8, {rows} rows, {keys} keys, D128",
                (8, 32, 8, rows, keys, 128),
                group="Cross",
                goal=(1.0, 1.0),
            )
        for batch, keys in ((1, 4096), (1, 65536), (16, 16384)):
            yield self.decode(batch, keys)
        for is_causal in (False, True):
            for batch, heads, length, dim in ((1, 8, 131072, 64), (8, 32, 8192, 64), (8, 16, 8192, 128)):
                yield self.linear(batch, heads, length, dim, is_causal)
        yield self.linear(8, 16, 8192, 64, True, "fp32")
        yield self.window(16384, 1023)
        yield self.masked(4096)
        yield self.bias(2048)
        yield self.packed()
        yield self.attention(
            "a call on 32 x 8 heads of 10 tokens, D64", (32, 8, 8, 10, 10, 64), group="Cost of a call", per_call=True
        )
