"""Glyphs: handwritten digits from scikit-learn (with a held-out split) and a printed 5 x 7 font."""

from functools import cache
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Split = Literal["train", "test"]
Alpha = NDArray[np.float32]

# every fourth image of the 1,797 is held out: 450 for the test split
_HELD_OUT_EVERY: Final = 4

# rows of a 5 x 7 bitmap, most significant bit on the left
_FONT: Final = (
    (14, 17, 19, 21, 25, 17, 14),
    (4, 12, 4, 4, 4, 4, 14),
    (14, 17, 1, 2, 4, 8, 31),
    (31, 2, 4, 2, 1, 17, 14),
    (2, 6, 10, 18, 31, 2, 2),
    (31, 16, 30, 1, 1, 17, 14),
    (6, 8, 16, 30, 17, 17, 14),
    (31, 1, 2, 4, 8, 8, 8),
    (14, 17, 17, 14, 17, 17, 14),
    (14, 17, 17, 15, 1, 2, 12),
)


@cache
def handwritten(split: Split) -> tuple[tuple[Image.Image, ...], ...]:
    """Load handwritten digits of one split, grouped by value.

    Args:
        split: `"train"` (1,347 images) or `"test"` (450 images, never drawn while training).

    Returns:
        Ten tuples of 8-bit 8 x 8 images; entry `d` shows the digit `d`.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    index = np.arange(len(data.target))
    held_out = index % _HELD_OUT_EVERY == 0
    chosen = index[held_out if split == "test" else ~held_out]
    groups: list[list[Image.Image]] = [[] for _ in range(10)]
    for i in chosen:
        pixels = np.clip(data.images[i] * 16.0, 0, 255).astype(np.uint8)
        groups[int(data.target[i])].append(Image.fromarray(pixels))
    return tuple(tuple(group) for group in groups)


@cache
def printed() -> tuple[Image.Image, ...]:
    """Draw the ten printed digits as 8-bit 7 x 9 images (one empty pixel all around)."""
    glyphs = []
    for rows in _FONT:
        pixels = np.zeros((9, 7), dtype=np.uint8)
        for y, bits in enumerate(rows):
            for x in range(5):
                pixels[y + 1, x + 1] = 255 * (bits >> (4 - x) & 1)
        glyphs.append(Image.fromarray(pixels))
    return tuple(glyphs)


def warp(
    glyph: Image.Image, size: tuple[int, int], scale: float, angle: float, shear: float
) -> Alpha:
    """Resample a glyph about its centre.

    Args:
        glyph: 8-bit single-channel image.
        size: Width and height of the result in pixels.
        scale: Result pixels per glyph pixel.
        angle: Rotation in radians.
        shear: Horizontal shear (0 is upright).

    Returns:
        Coverage in `[0, 1]`, shape (height, width), fp32.
    """
    width, height = size
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    a, b = cos + shear * sin, sin - shear * cos
    d, e = -sin, cos
    cx, cy = width / 2, height / 2
    matrix = (
        a, b, glyph.width / 2 - a * cx - b * cy,
        d, e, glyph.height / 2 - d * cx - e * cy,
    )  # fmt: skip
    out = glyph.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    return np.asarray(out, dtype=np.float32) / 255.0
