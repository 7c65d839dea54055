"""Positions of text and image tokens for rotary embedding along time, height and width."""

import math
from itertools import pairwise, product

import torch

from ..reference.inputs import sequence_offsets
from ._packed import check_offsets


def rotary_positions(modality, grids, cu_seqlens=None):
    """The positions (time, height, width) of text and image tokens in one sequence, for M-RoPE as in Qwen2-VL (Wang et
    al. 2024, arXiv 2409.12191, section 2.1).

    Text tokens count on, the same on all three axes. The tokens of an image of grid (t, h, w), in this order, have
    their place in the grid, added to the position that the image starts at; the text after it goes on at 1 more than
    the largest. So the token that follows a whole sequence is at `positions.amax((0, -1)) + 1`.

    Args:
        modality: integers (B, N), or (T,) for one sequence, or for several packed ones with cu_seqlens: 0 padding, 1
            text, 2 and above image.
        grids: (t, h, w) of every image or video, in order, sequence after sequence: integers (I, 3) or a list. Each has
            t * h * w tokens, so neighbouring images are told apart.
        cu_seqlens: int32 or int64 (S + 1,) offsets of S packed sequences.

    Returns:
        int64 (3, B, N) or (3, T), on modality's device; 0 for padding, which moves nobody's position.

    Raises:
        ValueError, TypeError: the images of modality are not those of grids.
    """
    if not isinstance(modality, torch.Tensor) or modality.is_floating_point() or modality.dim() not in (1, 2):
        raise ValueError("modality must be integers of shape (B, N), or (T,) for packed sequences")
    grids = _check_grids(grids)
    if cu_seqlens is not None:
        check_offsets("cu_seqlens", cu_seqlens)
        if modality.dim() != 1:
            raise ValueError(f"modality must have shape (T,) with cu_seqlens, got {tuple(modality.shape)}")
        offsets = sequence_offsets(cu_seqlens, len(modality), None, "cu_seqlens")
        kinds = modality.tolist()
        sequences = [kinds[begin:end] for begin, end in pairwise([*offsets, len(kinds)])]
    else:
        sequences = torch.atleast_2d(modality).tolist()
    remaining, places = iter(grids), []
    for number, kinds in enumerate(sequences):
        places += _sequence_places(kinds, remaining, number)
    unused = len(list(remaining))
    if unused:
        raise ValueError(f"grids names {len(grids)} images, and modality has the tokens of {len(grids) - unused}")
    places = torch.tensor(places, dtype=torch.int64, device=modality.device)
    return places.reshape(*modality.shape, 3).movedim(-1, 0)


def _sequence_places(kinds, grids, number):
    """(time, height, width) of each token of one sequence; an iterator gives the grids of its images."""
    places, following = [], 0
    while len(places) < len(kinds):
        begin = len(places)
        if kinds[begin] == 0:
            places.append((0, 0, 0))
        elif kinds[begin] == 1:
            places.append((following,) * 3)
            following += 1
        else:
            grid = next(grids, None)
            if grid is None:
                raise ValueError(f"grids has no grid for the image at token {begin} of sequence {number}")
            image = kinds[begin : begin + math.prod(grid)]
            if len(image) < math.prod(grid) or min(image) < 2:
                raise ValueError(
                    f"grids has {grid} = {math.prod(grid)} tokens for the image at token {begin} of sequence {number}, "
                    "where modality has fewer"
                )
            places += [tuple(following + i for i in place) for place in product(*map(range, grid))]
            following += max(grid)
    return places


def _check_grids(grids):
    if isinstance(grids, torch.Tensor):
        grids = grids.tolist()
    for grid in grids:
        if not isinstance(grid, (tuple, list)) or len(grid) != 3 or not all(isinstance(n, int) and n > 0 for n in grid):
            raise ValueError(f"grids must hold (t, h, w), three positive integers per image, got {grid!r}")
    return [tuple(grid) for grid in grids]
