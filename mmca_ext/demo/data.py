"""Two handwritten digits and a sentence about them.

The digits are scikit-learn's ``load_digits``: 1,797 real 8x8 scans, carried by the package, so nothing is
downloaded. Two of them go onto a 16x16 canvas, side by side or one above the other, and the caption says which:

    "three left of seven"        "two above nine"

The digits (not merely the canvases) are split: a digit used for testing is never seen in training.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

CANVAS = 16  # pixels, both ways
GLYPH = 8  # pixels of one digit, both ways

PAD, START, END = "<pad>", "<start>", "<end>"
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RELATIONS = ("left of", "above")
VOCABULARY = (PAD, START, END, *DIGIT_WORDS, "left", "of", "above")
PAD_ID, START_ID, END_ID = 0, 1, 2
MAX_WORDS = 4  # "three left of seven"
CAPTION_TOKENS = MAX_WORDS + 2  # with <start> and <end>

_WORD_ID = {word: index for index, word in enumerate(VOCABULARY)}


def caption(first: int, relation: int, second: int) -> str:
    """The sentence for digit values ``first`` and ``second`` and an index into RELATIONS."""
    return f"{DIGIT_WORDS[first]} {RELATIONS[relation]} {DIGIT_WORDS[second]}"


def encode(text: str) -> list[int]:
    """Token ids of a caption, <start> and <end> included, padded to CAPTION_TOKENS."""
    words = text.split()
    unknown = [word for word in words if word not in _WORD_ID]
    if unknown:
        raise ValueError(f"not in the vocabulary: {', '.join(unknown)}")
    ids = [START_ID, *(_WORD_ID[word] for word in words), END_ID]
    if len(ids) > CAPTION_TOKENS:
        raise ValueError(f"a caption has at most {MAX_WORDS} words, got {len(words)}")
    return ids + [PAD_ID] * (CAPTION_TOKENS - len(ids))


def decode(ids, vocabulary=VOCABULARY) -> str:
    """The caption of token ids: everything up to the first <end>, without <start> and <pad>."""
    words = []
    for token in (int(i) for i in ids):
        if token == END_ID:
            break
        if token not in (PAD_ID, START_ID):
            words.append(vocabulary[token])
    return " ".join(words)


# Every caption there is, in a table: 10 x 2 x 10 rows of CAPTION_TOKENS ids.
_CAPTION_IDS = torch.tensor(
    [[[encode(caption(a, r, b)) for b in range(10)] for r in range(len(RELATIONS))] for a in range(10)]
)


class Digits(NamedTuple):
    """Digit scans: pixels (N, 8, 8) float32 in 0..1, values (N,), and each scan's row in ``load_digits``."""

    pixels: np.ndarray
    values: np.ndarray
    source: np.ndarray


class Batch(NamedTuple):
    """Canvases (B, 16, 16) float32 in 0..1 (ink is 1) and their captions' token ids (B, CAPTION_TOKENS)."""

    images: torch.Tensor
    tokens: torch.Tensor


def split_digits(held_out: float = 0.2, seed: int = 0) -> tuple[Digits, Digits]:
    """(training, held-out) digits: disjoint, and the same share of every digit value in both."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    pixels = (scans.images / 16.0).astype(np.float32)
    values = scans.target.astype(np.int64)
    rng = np.random.default_rng(seed)
    train, test = [], []
    for value in range(10):
        rows = rng.permutation(np.flatnonzero(values == value))
        cut = round(len(rows) * held_out)
        test.append(rows[:cut])
        train.append(rows[cut:])

    def pick(rows):
        rows = np.sort(np.concatenate(rows))
        return Digits(pixels[rows], values[rows], rows)

    return pick(train), pick(test)


def _ink_box(glyphs: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """First inked row (axis=1) or column (axis=2) of each glyph (N, 8, 8), and how many from first to last."""
    inked = (glyphs > 0.1).any(axis=3 - axis)
    first = inked.argmax(axis=1)
    last = GLYPH - 1 - inked[:, ::-1].argmax(axis=1)
    return first, last - first + 1


def _place(first: np.ndarray, second: np.ndarray, axis: int, rng: np.random.Generator):
    """Ink starts of both glyphs along the axis of the relation, and across it.

    Along it, the room the two leave over is shared out at random before, between and after them, so they never
    overlap. Across it, their middles differ by two pixels at most, so "left of" cannot be taken for "above".
    """
    n = len(first)
    along_first, length_first = _ink_box(first, axis)
    along_second, length_second = _ink_box(second, axis)
    room = CANVAS - length_first - length_second
    before = rng.integers(0, room + 1)
    between = rng.integers(0, room - before + 1)
    start_first = before - along_first
    start_second = before + length_first + between - along_second

    middle = (CANVAS - GLYPH) // 2 + rng.integers(-2, 3, n)
    across_first = middle + rng.integers(-1, 2, n)
    across_second = middle + rng.integers(-1, 2, n)
    return (start_first, across_first), (start_second, across_second)


def compose(first: np.ndarray, second: np.ndarray, relation: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Glyph pairs (N, 8, 8) placed on canvases (N, 16, 16) by relation (N,), an index into RELATIONS."""
    n = len(first)
    # A margin of one glyph all round, cut off at the end: a glyph's own blank border may stick out of the canvas.
    canvas = np.zeros((n, CANVAS + 2 * GLYPH, CANVAS + 2 * GLYPH), np.float32)
    columns = _place(first, second, 2, rng)  # for "left of": (x, y) of both glyphs
    rows = _place(first, second, 1, rng)  # for "above": (y, x)
    is_left_of = relation == 0
    span = np.arange(GLYPH)
    for glyph, (left_x, left_y), (above_y, above_x) in zip((first, second), columns, rows):
        x = np.where(is_left_of, left_x, above_x) + GLYPH
        y = np.where(is_left_of, left_y, above_y) + GLYPH
        where = (np.arange(n)[:, None, None], y[:, None, None] + span[:, None], x[:, None, None] + span)
        canvas[where] = np.maximum(canvas[where], glyph)
    return canvas[:, GLYPH:-GLYPH, GLYPH:-GLYPH]


def warp(glyphs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Glyphs (N, 8, 8), each a little turned, slanted and stretched: more handwriting to learn from."""
    n = len(glyphs)
    angle = rng.uniform(-0.1, 0.1, n)
    slant = rng.uniform(-0.1, 0.1, n)
    width, height = rng.uniform(0.95, 1.08, (2, n))
    matrix = np.zeros((n, 2, 3), np.float32)
    matrix[:, 0, 0] = np.cos(angle) * width
    matrix[:, 0, 1] = slant - np.sin(angle)
    matrix[:, 1, 0] = np.sin(angle)
    matrix[:, 1, 1] = np.cos(angle) * height
    grid = functional.affine_grid(torch.from_numpy(matrix), (n, 1, GLYPH, GLYPH), align_corners=False)
    scans = torch.from_numpy(glyphs).unsqueeze(1)
    return functional.grid_sample(scans, grid, align_corners=False).squeeze(1).numpy()


def make_batch(digits: Digits, size: int, seed, augment: bool = False) -> Batch:
    """``size`` random canvases of ``digits``, warped with ``augment``.

    The same seed (an int or a sequence of ints) is the same batch.
    """
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, len(digits.values), (2, size))
    relation = rng.integers(0, len(RELATIONS), size)
    first, second = digits.pixels[a], digits.pixels[b]
    if augment:
        first, second = warp(first, rng), warp(second, rng)
    images = compose(first, second, relation, rng)
    tokens = _CAPTION_IDS[digits.values[a], relation, digits.values[b]]
    return Batch(torch.from_numpy(np.ascontiguousarray(images)), tokens)
