"""Scenes for the Qwen reference model: drawn at several resolutions, labelled by visual token."""

from functools import cache
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vispress.reference.model.dense import DenseBatch, collate
from vispress.reference.model.qwen import TOKEN
from vispress.reference.world.scenes import GRID, IMAGE_SIZE, Scene
from vispress.reference.world.words import COLOR_WORDS, DOT_WORDS, SHAPES, WHAT_WORDS

SIDES: Final = (7, 8, 9, 10)  # tokens along a picture: 84 to 120 pixels
_USUAL: Final = IMAGE_SIZE // TOKEN
_OFTEN: Final = 0.7

# a token is called what covers most of it, if that is at least so much
_LEAST: Final = 0.25


def side_of(seed: int, step: int) -> int:
    """Choose the tokens along the pictures of a training step: mostly 8, else any of `SIDES`."""
    rng = np.random.default_rng((seed, 4, step))
    return _USUAL if rng.random() < _OFTEN else int(rng.choice(SIDES))


def collate_tokens(scenes: list[Scene], side: int) -> DenseBatch:
    """Stack scenes, resized to `side` tokens along each edge, with labels of tokens.

    Args:
        scenes: B scenes.
        side: Tokens along an edge, n.

    Returns:
        Pixels (B, 12 n, 12 n, 3); labels have the shape (B, n * n).
    """
    batch = collate(scenes)
    labels = np.stack([token_labels(scene, side) for scene in scenes], axis=1)
    pixels = batch.pixels
    if side != _USUAL:
        pixels = torch.from_numpy(np.stack([resize(s.pixels, side * TOKEN) for s in scenes]))
    what, color, dot, center = torch.from_numpy(labels).unbind()
    return DenseBatch(pixels, what, color, dot, center, batch.content)


def resize(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Resize a square picture, (S, S, 3) to (size, size, 3)."""
    picture = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(picture).copy()


def token_labels(scene: Scene, side: int) -> NDArray[np.int64]:
    """Derive dense labels of `side` x `side` tokens from those of the scene's 12 x 12 patches.

    A token is labelled with the largest area that is not background. The token with the centre of
    a shape or a digit always has that item's name, colour and dot.

    Returns:
        Rows what, color, dot and center (see `DenseBatch`), int64, shape (4, side * side).
    """
    out = np.zeros((4, side * side), dtype=np.int64)
    parts = ((scene.what, WHAT_WORDS), (scene.color, COLOR_WORDS), (scene.dot, DOT_WORDS))
    share = _share(side)
    for row, (labels, words) in zip(out, parts, strict=False):
        one_hot = np.eye(len(words), dtype=np.float32)[labels].reshape(GRID, GRID, -1)
        area = np.einsum("ry,yxc,sx->rsc", share, one_hot, share, optimize=True)
        area = area.reshape(side * side, -1)[:, 1:]
        best = area.argmax(1)
        row[:] = np.where(area.max(1) >= _LEAST, best + 1, 0)
    for item in scene.items:
        y, x = (min(side - 1, int(at * side / IMAGE_SIZE)) for at in (item.y, item.x))
        token = y * side + x
        out[3, token] = 1
        if item.kind != "sign":
            offset = 1 if item.kind == "shape" else 1 + len(SHAPES)
            out[:3, token] = offset + item.value, 1 + item.color, 1 + item.dot
    return out


@cache
def _share(side: int) -> NDArray[np.float32]:
    """Compute the share of each token that each patch covers, along one axis: (side, 12)."""
    tokens, patches = np.arange(side)[:, None] / side, np.arange(GRID)[None, :] / GRID
    low, high = np.maximum(tokens, patches), np.minimum(tokens + 1 / side, patches + 1 / GRID)
    share: NDArray[np.float32] = (np.clip(high - low, 0, None) * side).astype(np.float32)
    return share
