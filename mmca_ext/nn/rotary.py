"""Rotary position embedding: along one axis, along several in one sequence (M-RoPE), and over the grid of an image."""

import math
from typing import NamedTuple

import torch
from torch import nn

from ._heads import check_choice, check_sizes
from ._packed import sequence_positions

AXES = ("sections", "interleaved", "axial")
PAIRS = ("half", "interleaved")


class Llama3Scaling(NamedTuple):
    """The frequency scaling of Llama 3.1 (arXiv 2407.21783; rope_type "llama3" in Hugging Face configurations).

    A frequency that turns less than low_freq_factor times within the original context is divided by `factor`; one that
    turns more than high_freq_factor times stays; between the two the share of each is linear in the turns.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def frequency(self, frequency):
        turns = self.original_max_position * frequency / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = min(max(kept, 0.0), 1.0)
        return frequency * (kept + (1 - kept) / self.factor)


class RotaryTable(NamedTuple):
    """cos (..., N, dim) and sin (..., N, rotary_dim / 2) of given positions; cos is 1 where nothing is rotated."""

    cos: torch.Tensor
    sin: torch.Tensor


class RotaryEmbedding(nn.Module):
    """Rotates pairs of features of queries and keys by angles that grow with the position, so that their product
    depends on the distance of the positions alone: Su et al. 2021 (arXiv 2104.09864), section 3.2.

        angle[i] = position * base^(-2 i / rotary_dim)         of pair i
        (a, b) -> (a cos - b sin, b cos + a sin)

    With `sections` a position has several axes and each pair turns with one of them:
        axes="sections"     runs of pairs: sections=(16, 24, 24) is the M-RoPE (time, height, width) of Qwen2-VL (Wang
                            et al. 2024, arXiv 2409.12191, section 2.1)
        axes="interleaved"  pair i turns with axis i % A while that section lasts, what remains with axis 0: Qwen3-VL
        axes="axial"        runs, each with a whole spectrum of its own, base^(-i / section): vision towers, with
                            sections=(dim / 4, dim / 4) for height and width

    Args:
        dim: features of a head.
        base: of the frequencies ("theta").
        sections: pairs of each axis, rotary_dim / 2 in all; None: one axis.
        axes: "sections", "interleaved" or "axial", see above.
        pairs: which features form pair i: "half": i and i + rotary_dim / 2 (Llama, NeoX, Hugging Face), or
            "interleaved": 2 i and 2 i + 1 (the paper, GPT-J).
        rotary_dim: how many of the features, the first, are rotated; None: all.
        scaling: divides the positions (Chen et al. 2023, arXiv 2306.15595), or a Llama3Scaling.

    No parameters, nothing in the state dict. Angles are computed in float64, whatever the model is cast to: with
    positions of a million the cosine is still right to the last bits of float32.

    Raises:
        ValueError, TypeError: at construction and at the call, naming the argument, its value and what is accepted.
    """

    def __init__(self, dim, base=10000.0, sections=None, axes="sections", pairs="half", rotary_dim=None, scaling=1.0):
        super().__init__()
        rotary_dim = dim if rotary_dim is None else rotary_dim
        check_sizes(dim=dim, rotary_dim=rotary_dim)
        if rotary_dim % 2 or rotary_dim > dim:
            raise ValueError(f"rotary_dim must be even and at most dim={dim}, got {rotary_dim}")
        check_choice("axes", axes, AXES)
        check_choice("pairs", pairs, PAIRS)
        _check_positive("base", base)
        _check_scaling(scaling)
        if sections is None:
            if axes != "sections":
                raise ValueError(f"axes={axes!r} needs sections: how many pairs each axis turns")
        else:
            _check_sections(sections, axes, rotary_dim // 2)
            sections = tuple(sections)
        self.dim, self.base, self.sections, self.axes, self.pairs = dim, base, sections, axes, pairs
        self.rotary_dim, self.scaling = rotary_dim, scaling
        self._make_buffers(None)

    def table(self, positions, dtype=torch.float32):
        """The cosines and sines of positions: made once, it serves every layer of a model as its `positions`.

        Args:
            positions: integers (or floats): with one axis (N,) or (B, N); with A axes (A, N) or (A, B, N), where 1 in
                place of A or B stands for all, or (N,): on all axes the same. Packed tokens are T in place of N.
            dtype: float32, or float64 for the rotation of float64.

        Returns:
            RotaryTable.
        """
        if not isinstance(positions, torch.Tensor):
            raise TypeError(f"positions must be a tensor, got {type(positions).__name__}")
        if positions.dtype == torch.bool or positions.is_complex():
            raise TypeError(f"positions must be integers, got {positions.dtype}")
        if self.sections is None:
            fits, accepted = positions.dim() in (1, 2), "(N,) or (B, N)"
        else:
            count = len(self.sections)
            fits = positions.dim() == 1 or (positions.dim() in (2, 3) and positions.shape[0] in (1, count))
            accepted = f"(N,), ({count}|1, N) or ({count}|1, B, N)"
        if not fits:
            raise ValueError(f"positions must have shape {accepted}, got {tuple(positions.shape)}")
        angles = positions.to(self.frequencies.device, torch.float64)
        if self.sections is None or angles.dim() == 1:
            angles = angles.unsqueeze(-1)
        else:
            angles = angles.expand(count, *angles.shape[1:]).movedim(0, -1).index_select(-1, self.axis_of_pair)
        angles = angles * self.frequencies
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        cos = torch.cat((cos, cos), -1) if self.pairs == "half" else cos.repeat_interleave(2, -1)
        if self.rotary_dim < self.dim:
            cos = nn.functional.pad(cos, (0, self.dim - self.rotary_dim), value=1.0)
        return RotaryTable(cos, sin)

    def forward(self, heads, positions):
        """Rotate queries or keys.

        Args:
            heads: (B, H, N, dim), or packed (T, H, dim).
            positions: as in `table`, or a table.

        Returns:
            Rotated heads, in their dtype and memory layout. float32 is the least that is computed in.
        """
        if not isinstance(heads, torch.Tensor) or heads.dim() not in (3, 4) or heads.shape[-1] != self.dim:
            shape = tuple(heads.shape) if isinstance(heads, torch.Tensor) else type(heads).__name__
            raise ValueError(f"heads must have shape (B, H, N, {self.dim}) or (T, H, {self.dim}), got {shape}")
        work = torch.float64 if heads.dtype == torch.float64 else torch.float32
        table = positions if isinstance(positions, RotaryTable) else self.table(positions, work)
        self._check_table(table, heads, work)
        cos, sin = table
        if heads.dim() == 3 or cos.dim() == 3:  # room for the heads
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        x = heads.to(work)
        out = x * cos  # keeps the layout of x, which a concatenation of rotated halves would not
        (first, second), (x_first, x_second) = self._pairs(out), self._pairs(x)
        first.addcmul_(x_second, sin, value=-1)
        second.addcmul_(x_first, sin)
        return out.to(heads.dtype)

    def _pairs(self, x):
        half = self.rotary_dim // 2
        if self.pairs == "half":
            return x[..., :half], x[..., half : 2 * half]
        return x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]

    def _check_table(self, table, heads, work):
        cos, batch, tokens = table.cos, heads.shape[0], heads.shape[-2]
        if heads.dim() == 3:
            batch, tokens = None, heads.shape[0]
        if cos.shape[-2:] != (tokens, self.dim) or (cos.dim() == 3 and cos.shape[0] not in (1, batch)):
            raise ValueError(
                f"positions must be those of heads {tuple(heads.shape)}, one per token, "
                f"got {tuple(cos.shape[:-1])} for dim={cos.shape[-1]}"
            )
        if cos.dtype != work:
            raise TypeError(f"the table of positions for {heads.dtype} must be made with dtype={work}, got {cos.dtype}")

    def _make_buffers(self, device):
        half = self.rotary_dim // 2
        sections = self.sections or (half,)
        axis = _axis_of_pair(sections, self.axes)
        exponents = [i / half for i in range(half)]
        if self.axes == "axial":
            exponents = [i / section for section in sections for i in range(section)]
        frequencies = [self.base**-exponent for exponent in exponents]
        if isinstance(self.scaling, Llama3Scaling):
            frequencies = [self.scaling.frequency(f) for f in frequencies]
        else:
            frequencies = [f / self.scaling for f in frequencies]
        frequencies = torch.tensor(frequencies, dtype=torch.float64, device=device)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.register_buffer("axis_of_pair", torch.tensor(axis, device=device), persistent=False)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._make_buffers(self.frequencies.device)  # model.half() must not round them, nor to_empty() leave them empty
        return self

    def extra_repr(self):
        return (
            f"dim={self.dim}, base={self.base}, sections={self.sections}, axes={self.axes!r}, pairs={self.pairs!r}, "
            f"rotary_dim={self.rotary_dim}, scaling={self.scaling}"
        )


def rotate_heads(rotary, query, key, positions, cu_seqlens, cache):
    """A layer's queries and keys of new tokens, rotated; by default their positions count from the start of each
    sequence, or on from the cache. `rotary` may be None."""
    if rotary is None:
        if positions is not None:
            raise ValueError("positions are for a layer with rotary, and this one has none")
        return query, key
    if positions is not None:
        if cache is not None:
            cache.explicit_positions = True
    elif rotary.sections is not None:
        raise ValueError(f"positions must be given: rotary has {len(rotary.sections)} axes (see rotary_positions)")
    elif cu_seqlens is not None:
        positions = sequence_positions(cu_seqlens, query.shape[0])
    else:
        begin = 0 if cache is None else cache.length
        if begin and cache.explicit_positions:
            raise ValueError("positions must be given: those of the tokens in the cache were")
        positions = torch.arange(begin, begin + query.shape[2], device=query.device)
    if not isinstance(positions, RotaryTable):
        positions = rotary.table(positions, torch.float64 if query.dtype == torch.float64 else torch.float32)
    return rotary(query, positions), rotary(key, positions)


def check_rotary(rotary, dim_head):
    if rotary is None:
        return
    if not isinstance(rotary, RotaryEmbedding):
        raise TypeError(f"rotary must be a RotaryEmbedding, got {type(rotary).__name__}")
    if rotary.dim != dim_head:
        raise ValueError(f"rotary must be for dim_head={dim_head} features, got one for {rotary.dim}")


def _check_positive(name, value):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value!r}")


def _check_scaling(scaling):
    if not isinstance(scaling, Llama3Scaling):
        return _check_positive("scaling", scaling)
    for name, value in scaling._asdict().items():
        _check_positive(f"scaling: {name}", value)
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise ValueError(f"scaling: low_freq_factor must be below high_freq_factor, got {scaling}")


def _check_sections(sections, axes, pairs):
    if not isinstance(sections, (tuple, list)) or len(sections) < 2:
        raise ValueError(f"sections must name the pairs of two axes or more, got {sections!r}")
    check_sizes(**{f"sections[{axis}]": section for axis, section in enumerate(sections)})
    if sum(sections) != pairs:
        raise ValueError(f"sections must add up to rotary_dim / 2 = {pairs} pairs, got {sections!r}")
    axis_of_pair = _axis_of_pair(sections, axes)
    if [axis_of_pair.count(axis) for axis in range(len(sections))] != list(sections):
        raise ValueError(f'sections {sections!r} do not fit axes="interleaved": a later axis is too long')


def _axis_of_pair(sections, axes):
    """Which axis turns each pair."""
    if axes != "interleaved":
        return [axis for axis, section in enumerate(sections) for _ in range(section)]
    count = len(sections)
    return [i % count if i < count * sections[i % count] else 0 for i in range(sum(sections))]
