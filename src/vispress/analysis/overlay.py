"""Kept tokens drawn over the picture: survivors bright and outlined, the rest dimmed by depth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vispress.analysis.inspect import View
from vispress.bench.model.loaded_model import LoadedModel
from vispress.bench.results.plots import save_figure
from vispress.bench.tasks.task import Prompt
from vispress.report import ImageReport

_DIMMEST, _BRIGHTEST = 0.16, 0.6
_OUTLINE, _EVIDENCE = "#ffffff", "#ffd400"


def seen_picture(loaded: LoadedModel, prompt: Prompt, number: int = 0) -> NDArray[np.float64]:
    """A picture as the model sees it (resized, cropped), `[H, W, 3]` in `[0, 1]`.

    Models that take patches in place of a picture get the original.

    Args:
        loaded: The model.
        prompt: A question.
        number: Which of its pictures.
    """
    pixels = loaded.encode([prompt])["pixel_values"].float().cpu().numpy()
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        return np.asarray(prompt.images[number].convert("RGB"), dtype=np.float64) / 255
    images = loaded.processor.image_processor
    mean, std = np.asarray(images.image_mean), np.asarray(images.image_std)
    seen: NDArray[np.float64] = np.clip(pixels[number].transpose(1, 2, 0) * std + mean, 0.0, 1.0)
    return seen


def brightness(image: ImageReport) -> NDArray[np.float64]:
    """How bright each token is drawn, `[h, w]`: 1 if kept to the end, darker if dropped early."""
    assert image.grid is not None  # `inspect` refuses others
    frames, rows, columns = image.grid
    values = np.full(frames * rows * columns, _DIMMEST)
    stages = len(image.placements)
    for number, placement in enumerate(image.placements[:-1], start=1):
        level = _DIMMEST + (_BRIGHTEST - _DIMMEST) * number / (stages - 1)
        values[list(placement.kept)] = level
    values[list(image.kept)] = 1.0
    first: NDArray[np.float64] = values.reshape(frames, rows, columns)[0]
    return first


def draw_views(
    picture: NDArray[np.float64],
    views: Sequence[View],
    question: str,
    path: Path,
    *,
    evidence: Sequence[int] = (),
    truth: str = "",
) -> Path:
    """Draw all views side by side.

    Args:
        picture: `[H, W, 3]` in `[0, 1]`.
        views: As from `inspect`.
        question: Shown on top.
        path: The file; its suffix chooses the format.
        evidence: Tokens that hold the answer, outlined in yellow.
        truth: The right answer, where known.

    Raises:
        ResultsError: The file cannot be written.
    """
    from matplotlib.figure import Figure

    columns = min(4, len(views))
    rows = -(-len(views) // columns)
    figure = Figure(figsize=(3.1 * columns, 3.6 * rows + 0.9), layout="constrained")
    subtitle = "\nwhite: kept to the end; darker: dropped earlier"
    subtitle += "; yellow: holds the answer" if evidence else ""
    if any("merges" in view.title for view in views):
        subtitle += "; merged tokens are drawn at the places that they take"
    answer = f"   (right answer: {truth})" if truth else ""
    figure.suptitle(f"{question}{answer}{subtitle}", fontsize=10)
    grid = next((view.image.grid for view in views if view.image), None)
    for number, view in enumerate(views):
        axes = figure.add_subplot(rows, columns, number + 1)
        _panel(axes, picture, view)
        if grid is not None:
            for token in evidence:
                _frame(axes, picture, token, grid[1:], _EVIDENCE, inset=0.0, width=1.3)
    return save_figure(figure, path)


def _panel(axes: Any, picture: NDArray[np.float64], view: View) -> None:
    axes.set_axis_off()
    title = f"{view.title}\n"
    if view.image is None or view.image.grid is None:
        axes.imshow(picture, interpolation="nearest")
    else:
        light = brightness(view.image)
        height, width = picture.shape[:2]
        ys = np.arange(height) * light.shape[0] // height
        xs = np.arange(width) * light.shape[1] // width
        axes.imshow(picture * light[ys[:, None], xs[None, :], None], interpolation="nearest")
        for token in view.image.kept:
            if token < light.size:
                _frame(axes, picture, token, light.shape, _OUTLINE, inset=0.06, width=0.7)
        title += f"{view.image.num_kept} of {view.image.num_visual} at the end, "
        title += f"mean {100 * view.mean_keep_ratio:.0f} %\n"
    said = f"“{view.answer}”" if view.answer else ""
    axes.set_title(f"{title}{said}", fontsize=9)


def _frame(
    axes: Any,
    picture: NDArray[np.float64],
    token: int,
    grid: tuple[int, ...],
    color: str,
    *,
    inset: float,
    width: float,
) -> None:
    """Outline one token."""
    from matplotlib.patches import Rectangle

    high, wide = picture.shape[0] / grid[0], picture.shape[1] / grid[1]
    row, column = divmod(token, grid[1])
    corner = ((column + inset) * wide - 0.5, (row + inset) * high - 0.5)
    sides = ((1 - 2 * inset) * wide, (1 - 2 * inset) * high)
    axes.add_patch(Rectangle(corner, *sides, fill=False, edgecolor=color, linewidth=width))
