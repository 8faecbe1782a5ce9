"""Where the tokens of an image stand, as plain values that can be remembered by."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from vispress.types import VisualTokens

Geometry = tuple[Any, ...]
"""Segments, rows and columns of the original tokens; or `(t, h, w)`."""


def geometry_of(tokens: VisualTokens) -> Geometry:
    """Read it from a bucket; where the model gives none, all tokens stand in one row."""
    if (crops := tokens.crops) is not None:
        return tuple(tuple(x.tolist()) for x in (crops.segment, crops.row, crops.col))
    return tokens.grid or (1, 1, tokens.num_original)


def coordinates(
    geometry: Geometry,
) -> tuple[Int[Tensor, "N0"], Int[Tensor, "N0"], Int[Tensor, "N0"]]:
    """Give segment (or frame), row and column of each original token; segment -1 is a newline."""
    if isinstance(geometry[0], int):
        t, h, w = geometry
        place = torch.arange(t * h * w)
        return place // (h * w), place // w % h, place % w
    segment, row, col = map(torch.tensor, geometry)
    return segment, row, col
