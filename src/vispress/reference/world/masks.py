"""Outlines of the eight shapes as precomputed, antialiased masks."""

from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vispress.reference.world.digits import Alpha
from vispress.reference.world.words import SHAPES

Plane = NDArray[np.float64]

WINDOW: Final = 24  # side of a mask in pixels
VARIANTS: Final = 96  # masks a shape


@cache
def shape_masks() -> Alpha:
    """Draw antialiased masks (8, variants, 24, 24): sizes and small rotations of each shape."""
    rng = np.random.default_rng(0)
    masks = np.zeros((len(SHAPES), VARIANTS, WINDOW, WINDOW), dtype=np.float32)
    axis = np.arange(WINDOW) + 0.5 - WINDOW / 2
    for variant in range(VARIANTS):
        radius, angle = rng.uniform(8.3, 10.2), rng.uniform(-0.15, 0.15)
        fx, fy = rng.uniform(-0.5, 0.5, 2)
        x, y = (axis - fx)[None, :], (axis - fy)[:, None]
        u = (np.cos(angle) * x + np.sin(angle) * y) / radius
        v = (np.cos(angle) * y - np.sin(angle) * x) / radius
        for shape, name in enumerate(SHAPES):
            masks[shape, variant] = np.clip(0.5 - _distance(name, u, v) * radius, 0, 1)
    return masks


def _distance(name: str, u: Plane, v: Plane) -> Plane:
    """Compute the signed distance to a shape's outline (about unit radius), negative inside."""
    r, au, av = np.hypot(u, v), np.abs(u), np.abs(v)
    out: Plane
    if name == "circle":
        out = r - 0.92
    elif name == "ring":
        out = np.abs(r - 0.72) - 0.23
    elif name == "square":
        out = np.maximum(au, av) - 0.82
    elif name == "diamond":
        out = (au * 1.15 + av * 0.95 - 1.0) / 1.49
    elif name == "triangle":
        out = np.maximum(v - 0.8, (2 * au - v - 0.95) / np.sqrt(5))
    elif name == "cross":
        out = np.minimum(np.maximum(au - 1.0, av - 0.3), np.maximum(av - 1.0, au - 0.3))
    elif name == "crescent":
        out = np.maximum(r - 0.97, 0.72 - np.hypot(u - 0.5, v))
    else:
        # star: five edges between radius 1.05 and 0.45
        theta = np.abs((np.arctan2(u, -v) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
        px, py = r * np.cos(theta), r * np.sin(theta)
        ex, ey = 0.45 * np.cos(np.pi / 5) - 1.05, 0.45 * np.sin(np.pi / 5)
        out = (-(py * ex - (px - 1.05) * ey)) / np.hypot(ex, ey)
    return out
