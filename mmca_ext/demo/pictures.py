"""The pictures of a training run."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # to files, also where there is no display

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from PIL import Image

from . import data

BLUE, ORANGE, GREEN, RED = "#2f6fab", "#d9822b", "#2e8b57", "#c0392b"
HEAT = LinearSegmentedColormap.from_list("heat", ["white", "#fdd08b", "#f2803a", "#b3202c"])


def loss_curve(losses: list[float], checks: list[tuple[int, float]], path: Path) -> None:
    """Training loss by step, and (step, held-out accuracy) pairs on a second axis."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color=BLUE, alpha=0.25, linewidth=0.8)
    width = max(1, len(losses) // 40)
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    axes.plot(steps[width // 2 :][: len(smooth)], smooth, color=BLUE, linewidth=2)
    axes.set_yscale("log")
    axes.set_xlabel("training step")
    axes.set_ylabel("training loss per word (nats)", color=BLUE)
    axes.spines[["top"]].set_visible(False)
    if checks:
        right = axes.twinx()
        right.plot(*zip(*checks, strict=True), "o-", color=ORANGE, markersize=5)
        right.set_ylim(0, 1)
        right.set_ylabel("held-out captions exactly right", color=ORANGE)
        right.spines[["top"]].set_visible(False)
        right.annotate(
            f"{checks[-1][1]:.1%}", checks[-1], textcoords="offset points", xytext=(-6, 8), ha="right", color=ORANGE
        )
    axes.set_title("Learning to caption two digits")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def attention_maps(images, truths: list[str], captions: list[str], maps, stride: int, path: Path) -> None:
    """One row per canvas: the canvas, then each word of its caption over the patches it looked at.

    Arrays: images (N, 16, 16); maps (N, T, grid, grid) with row t for word t, the patches `stride` pixels apart.
    """
    rows = len(images)
    figure, grid = plt.subplots(
        rows, data.MAX_WORDS + 1, figsize=(9.4, 1.95 * rows + 0.9), layout="constrained", squeeze=False
    )
    shown = None
    for axes, image, truth, text, weights in zip(grid, images, truths, captions, maps, strict=True):
        words = text.split()
        right = text == truth
        axes[0].set_title(text if right else f"{text}\n(is: {truth})", fontsize=10, color=GREEN if right else RED)
        for cell in axes[len(words) + 1 :]:
            cell.set_axis_off()
        for cell, word, weight in zip(axes[1:], words, weights, strict=False):
            cell.set_title(word, fontsize=12)
            reach = stride * len(weight) / 2
            low, high = data.CANVAS / 2 - reach, data.CANVAS / 2 + reach
            shown = cell.imshow(weight, cmap=HEAT, vmin=0, vmax=0.5, extent=(low, high, high, low))
        for cell in axes[: len(words) + 1]:
            # The ink, on whatever is there already.
            alpha = image * (0.85 if cell.images else 1)
            cell.imshow(0 * image, cmap="gray", vmin=0, vmax=1, alpha=alpha, extent=(0, data.CANVAS, data.CANVAS, 0))
            cell.set(xlim=(0, data.CANVAS), ylim=(data.CANVAS, 0), xticks=[], yticks=[])
    if shown is not None:
        bar = figure.colorbar(shown, ax=grid, shrink=min(1, 2 / rows), aspect=20, pad=0.02, extend="max")
        bar.set_label("share of the word's attention")
    figure.suptitle("What the model says, and where it looks for each word", fontsize=13)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def samples(images, truths: list[str], folder: Path) -> list[Path]:
    """Writes canvases, an array (N, 16, 16), as 256 x 256 PNG files named by their true captions.

    Dark on light and light on dark by turns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, (image, truth) in enumerate(zip(images, truths, strict=True)):
        ink = image if index % 2 else 1 - image
        picture = Image.fromarray((255 * ink).round().astype(np.uint8))
        path = folder / f"{index + 1}_{truth.replace(' ', '_')}.png"
        picture.resize((256, 256), Image.Resampling.NEAREST).save(path)
        paths.append(path)
    return paths
