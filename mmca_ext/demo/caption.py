"""Caption an image file of two digits with a trained model."""

from pathlib import Path

import numpy as np
import torch

from . import data
from .model import load_checkpoint
from .problem import Problem, require


def add_arguments(parser):
    parser.add_argument("image", type=Path, help="an image file: two digits, dark on light or light on dark")
    parser.add_argument("--model", type=Path, default=Path("demo_output/model.pt"), help="a model.pt of `train`")
    parser.add_argument("--map", type=Path, help="also draw which patches each word looked at, to this PNG file")


def run(options) -> str:
    """The command: prints the caption and the confidence in each word; returns the caption."""
    require(PIL="pillow", **({"matplotlib": "matplotlib"} if options.map else {}))
    views = torch.from_numpy(framings(read_ink(options.image)))
    model = load_checkpoint(options.model)
    tokens, confidence = model.generate(views)
    best = int(confidence.log().sum(1).argmax())  # the framing that the model is surest of
    text = data.decode(tokens[best])
    words = text.split()
    print(text)
    print("  ".join(f"{word} {sure:.2f}" for word, sure in zip(words, confidence[best, 1:].tolist(), strict=False)))
    if options.map:
        _draw(model, views[best : best + 1], tokens[best : best + 1], text, options.map)
    return text


def read_ink(path: Path) -> np.ndarray:
    """An image file as ink, (height, width) float32 in 0..1 with 0 for the background, whichever of the two is darker.

    The background is what most of the image's border shows.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            picture.load()
    except FileNotFoundError:
        raise Problem(f"no such file: {path}") from None
    except UnidentifiedImageError:
        raise Problem(f"{path} is not an image file that pillow can read") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise Problem(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None

    grey = _grey(picture)
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    background = np.median(border)
    darker, lighter = background - grey.min(), grey.max() - background
    ink = background - grey if darker > lighter else grey - background
    strongest = ink.max()
    if strongest < 0.05:
        raise Problem(f"{path} is blank")
    return (ink.clip(0) / strongest).astype(np.float32)


def _grey(picture) -> np.ndarray:
    """Brightness in 0..1 of a pillow image of any mode."""
    if picture.mode.startswith(("I", "F")):  # 16 or 32 bits per pixel: there is no telling what white is
        grey = np.asarray(picture, np.float32)
        low, high = grey.min(), grey.max()
        return (grey - low) / max(high - low, 1e-6)
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        pixels = np.asarray(picture.convert("L"), np.float32) / 255
        alpha = np.asarray(picture.getchannel("A"), np.float32) / 255
        # Drawn on nothing: put dark drawings on white, light ones on black.
        brightness = (pixels * alpha).sum() / max(alpha.sum(), 1e-6)
        return pixels * alpha + (1 - alpha) * (brightness < 0.5)
    return np.asarray(picture.convert("L"), np.float32) / 255


def framings(ink: np.ndarray) -> np.ndarray:
    """Canvases (F, 16, 16) to try for ink (height, width).

    An image laid out like the training canvases (square, the ink filling it) is taken as it is. Otherwise the ink is
    cut out and centred in the sizes that training canvases have: one digit's height for digits side by side, two
    digits' height for one above the other.
    """
    rows, columns = (np.flatnonzero((ink > 0.3).any(axis)) for axis in (1, 0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    height, width = bottom - top, right - left
    side = ink.shape[0]
    if ink.shape[1] == side and max(height, width) >= 0.45 * side:
        return np.stack([_shrink(ink)])
    views = []
    for digits_high in (1, 2):
        square = max(height * data.CANVAS / (digits_high * data.GLYPH), height, width)
        canvas = np.zeros((int(square), int(square)), np.float32)
        y, x = (len(canvas) - height) // 2, (len(canvas) - width) // 2
        canvas[y : y + height, x : x + width] = ink[top:bottom, left:right]
        views.append(_shrink(canvas))
    return np.stack(views)


def _shrink(ink: np.ndarray) -> np.ndarray:
    """(N, N) to (16, 16), each pixel the mean of its share, as the scans were made; the darkest becomes 1."""
    from PIL import Image

    size = (data.CANVAS, data.CANVAS)
    small = np.asarray(Image.fromarray(ink).resize(size, Image.Resampling.BOX))
    return small / max(small.max(), 1e-6)


def _draw(model, image, tokens, text: str, path: Path) -> None:
    from . import pictures

    maps = model.attention_maps(image, tokens[:, :-1]).numpy()
    try:
        pictures.attention_maps(image.numpy(), [text], [text], maps, model.config.stride, path)
    except (OSError, ValueError) as error:
        raise Problem(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
    print(f"map in {path}")
