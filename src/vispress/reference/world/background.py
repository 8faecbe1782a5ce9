"""Backgrounds of scenes."""

from functools import cache

import numpy as np
from numpy.typing import NDArray


def background(rng: np.random.Generator, side: int) -> NDArray[np.float32]:
    """Draw a dim canvas: low-frequency colour plus a grating, fp32 (S, S, 3)."""
    base = rng.uniform(55, 110) + rng.uniform(-22, 22, (4, 4, 3))
    up = _upsample(side)
    canvas: NDArray[np.float64] = np.einsum("yi,ijc,xj->yxc", up, base, up, optimize=True)
    t = np.arange(side) * rng.uniform(0.1, 0.7)
    angle = rng.uniform(0, np.pi)
    wave = np.sin(np.cos(angle) * t[:, None] + np.sin(angle) * t[None, :] + rng.uniform(0, 6.3))
    canvas += (rng.uniform(0, 12) * wave)[..., None]
    return canvas.astype(np.float32)


@cache
def _upsample(side: int) -> NDArray[np.float64]:
    """Interpolate linearly from 4 knots to `side` pixels, shape (side, 4)."""
    at = np.linspace(0, 3, side)
    weights: NDArray[np.float64] = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(4)[None, :]))
    return weights
