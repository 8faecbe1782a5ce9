"""Thinning of what is left of a raster: at equal steps along it, or along columns and rows in turn.

All of it is host arithmetic on places; nothing looks at a token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from vispress.devices import sent
from vispress.methods._parts.geometry.coordinates import Geometry, coordinates, geometry_of
from vispress.methods.base import remembered, segment_shares
from vispress.types import Memory, TokenPlan, VisualTokens

Offset = Literal["first", "last"]
"""Which token of a group stays."""


@dataclass(frozen=True)
class Places:
    """Where tokens of one sub-image or frame stand; on the host.

    Args:
        row: `[n]`, in the sub-image.
        col: `[n]`.
        extent: Rows and columns of the whole sub-image.
    """

    row: Int[Tensor, "n"]
    col: Int[Tensor, "n"]
    extent: tuple[int, int]


Thin = Callable[[Places, int], Int[Tensor, "share"]]
"""Which tokens of a sub-image stay, ascending; their number is at least 1."""


@dataclass(frozen=True)
class Left:
    """Places of an image's original raster that were left; what is remembered of it."""

    index: tuple[int, ...] | range


def thin_each(tokens: VisualTokens, num_keep: int, thin: Thin) -> TokenPlan:
    """Thin each sub-image and frame on its own, with the budget of `segment_shares`.

    Synchronises only for images that something else pruned since.
    """
    geometry, before = geometry_of(tokens), _left(tokens)
    found = [_thin_image(each, geometry, num_keep, thin) for each in before]
    kept = torch.stack([keep for keep, _ in (found[:1] if len({*before}) == 1 else found)])
    return TokenPlan(
        keep=sent(kept, tokens.features.device).expand(tokens.batch, -1),
        memory=tuple(Memory(value=left) for _, left in found),
    )


def _left(tokens: VisualTokens) -> list[Left]:
    """Say what is left of each image; from memory, if nothing was dropped since then."""
    if tokens.num_visual == tokens.num_original:
        return [Left(range(tokens.num_original))] * tokens.batch
    known = [m.value for m in tokens.memory if isinstance(m.value, Left)]
    if known and all(len(left.index) == tokens.num_visual for left in known):
        return known
    return [Left(tuple(row)) for row in tokens.index.tolist()]


@remembered
def _thin_image(before: Left, geometry: Geometry, num_keep: int, thin: Thin) -> tuple[Tensor, Left]:
    """Choose `[K]` of the places that were left, ascending, and say what is left then.

    Args:
        before: What was left.
        geometry: Where the original tokens stand.
        num_keep: K.
        thin: Thins a part.
    """
    own = torch.tensor(before.index)
    segment, row, col = coordinates(geometry)
    picked = []
    for number, share in segment_shares(segment[own], num_keep).items():
        places = torch.where(segment[own] == number)[0]
        if number >= 0 and share:
            all_of_it = segment == number
            h, w = (int(x[all_of_it].max() - x[all_of_it].min()) + 1 for x in (row, col))
            there = own[places]
            places = places[thin(Places(row[there], col[there], (h, w)), share)]
        picked.append(places[:share])
    keep = torch.cat(picked).sort().values
    return keep, Left(tuple(own[keep].tolist()))


def thin_run(count: int, num_keep: int, offset: Offset) -> Int[Tensor, "num_keep"]:
    """Keep one of each `count // num_keep` in a run; equal groups where none is that large.

    A stride leaves `count // stride` tokens: ranks `stride - 1, 2 stride - 1, ...` for `"last"`,
    `0, stride, ...` for `"first"`; what is behind the last whole group goes.
    """
    stride, step = count // num_keep, torch.arange(num_keep)
    if count // stride == num_keep:
        return step * stride + (stride - 1 if offset == "last" else 0)
    return (step + 1) * count // num_keep - 1 if offset == "last" else step * count // num_keep


def thin_grid(
    places: Places, num_keep: int, stride: int, offset: Offset
) -> Int[Tensor, "num_keep"]:
    """Thin along columns and rows in turn, by `stride` at a time, whichever axis is denser.

    Lines of unequal length, and counts that no lattice has, are shared out evenly.
    """
    left = torch.arange(len(places.row))
    while len(left) > num_keep:
        target = len(left) // stride
        left = left[_thin_lines(places, left, target if target > num_keep else num_keep, offset)]
    return left


def _thin_lines(places: Places, left: Tensor, num_keep: int, offset: Offset) -> Tensor:
    """Thin one axis; ascending indices into `left`."""
    row, col = places.row[left], places.col[left]
    h, w = places.extent
    # distance of neighbours along each axis, as h / rows and w / columns, cleared of fractions
    down, across = h * len(torch.unique(col)), w * len(torch.unique(row))
    line, along = (row, col) if across <= down else (col, row)
    order = (line * max(h, w) + along - along.min()).argsort()
    sizes = torch.unique(line, return_counts=True)[1].tolist()
    picked, start = [], 0
    for size in sizes:
        end = start + size
        share = end * num_keep // len(left) - start * num_keep // len(left)
        if share:
            picked.append(order[start:end][thin_run(size, share, offset)])
        start = end
    return torch.cat(picked).sort().values
