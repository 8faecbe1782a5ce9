"""Grid methods: each sub-image or frame goes to a smaller grid `h' x w'` of the same aspect.

The tokens at the centres of the new cells are the kept ones (uniform sampling); `resample` puts
values there that mix all tokens of the sub-image, each channel by itself. The product `h' w'`
seldom meets a budget exactly: it never exceeds it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from math import log
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.devices import sent
from vispress.errors import UnsupportedMethodError
from vispress.methods._parts.geometry.segments import GEOMETRY
from vispress.methods.base import remembered, segment_shares
from vispress.types import CropLayout, Signal, TokenPlan, VisualTokens

Values = Literal["vision_features", "features"]
"""What is resampled: the projector's input (then projected), or the visual tokens themselves."""

Shrink = Callable[
    [Float[Tensor, "B n D"], tuple[int, int], tuple[int, int]], Float[Tensor, "B m D"]
]
"""From a raster `n = h w` to a smaller one `m = h' w'`: `shrink(x, (h, w), (h', w'))`."""


@dataclass(frozen=True)
class Raster:
    """Full grid of one sub-image; tensors on the host.

    Args:
        places: `[h, w]`; the tokens in raster order.
        small: `(h', w')`, the grid it goes to.
        share: Its part of the budget.
        whole: It is all of the image, in order.
    """

    places: Int[Tensor, "h w"]
    small: tuple[int, int]
    share: int
    whole: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """`(h, w)`."""
        h, w = self.places.shape
        return h, w

    @cached_property
    def centres(self) -> Int[Tensor, "m"]:
        """Token nearest to the centre of each new cell, in raster order."""
        (h, w), (rows, cols) = self.places.shape, self.small
        return self.places[middles(h, rows)][:, middles(w, cols)].flatten()


@dataclass(frozen=True)
class Layout:
    """What a budget makes of an image; tensors on the host.

    Args:
        found: Every sub-image with its new grid.
        newlines: Newline tokens that are kept.
        keep: `[K]`, newlines and the centres of new cells, ascending.
        order: `[K]`, place of each in the order of `found`, newlines last; None where it is that.
    """

    found: tuple[Raster, ...]
    newlines: Int[Tensor, "newlines"]
    keep: Int[Tensor, "K"]
    order: Int[Tensor, "K"] | None


def signals_for(on: Values) -> frozenset[Signal]:
    """Name what `resample` reads."""
    if on == "features":
        return GEOMETRY
    return GEOMETRY | {Signal.VISION_FEATURES, Signal.PROJECTOR}


@remembered
def middles(large: int, small: int) -> Int[Tensor, "small"]:
    """Find the middles of `small` equal cells: `floor((i + 0.5) large / small)`."""
    return (2 * torch.arange(small) + 1) * large // (2 * small)


def small_grid(h: int, w: int, num_keep: int) -> tuple[int, int]:
    """Choose the grid of at most `num_keep` cells that can grow on no axis, closest in aspect.

    Ties: more cells, then fewer rows. `num_keep` must be at least 1.
    """
    grids = [(rows, min(w, num_keep // rows)) for rows in range(1, min(h, num_keep) + 1)]
    whole = [(r, c) for r, c in grids if r == h or (r + 1) * c > num_keep]
    # aspect to 9 digits: mirrored grids tie whatever the rounding of log
    return min(whole, key=lambda g: (round(abs(log(g[0] * w / (g[1] * h))), 9), -g[0] * g[1], g[0]))


def rasters(
    tokens: VisualTokens, num_keep: int
) -> tuple[tuple[Raster, ...], Int[Tensor, "newlines"]]:
    """List every sub-image with its new grid, and the newline tokens that are kept.

    Raises:
        UnsupportedMethodError: As `layout`.
    """
    found = layout(tokens, num_keep)
    return found.found, found.newlines


def layout(tokens: VisualTokens, num_keep: int) -> Layout:
    """Lay a budget out over the images of a bucket.

    Raises:
        UnsupportedMethodError: The tokens are no full grids (pruned before, or a ragged layout).
    """
    if tokens.num_visual != tokens.num_original or (tokens.grid is None and tokens.crops is None):
        raise UnsupportedMethodError(
            f"grid methods need whole images with a known grid, got {tokens.num_visual} of "
            f"{tokens.num_original} tokens, grid={tokens.grid}; put them first in a chain, and "
            "mask no single tokens of an image (a whole image may be masked)"
        )
    if tokens.grid is not None and tokens.crops is None:
        return _of_frames(tokens.grid, num_keep)
    assert tokens.crops is not None
    return _of_crops(tokens.crops, num_keep)


@remembered
def _of_crops(crops: CropLayout, num_keep: int) -> Layout:
    return _layout(crops.segment, partial(_raster, crops), num_keep)


@remembered
def _of_frames(grid: tuple[int, int, int], num_keep: int) -> Layout:
    t, h, w = grid
    segments = torch.arange(t * h * w) // (h * w)
    return _layout(segments, lambda places: places.view(h, w), num_keep)


def _layout(segments: Tensor, raster_of: Callable[[Tensor], Tensor], num_keep: int) -> Layout:
    found, newlines = [], segments.new_empty(0)
    for segment, share in segment_shares(segments, num_keep).items():
        places = torch.where(segments == segment)[0]
        if segment == -1:
            newlines = places[:share]
        elif share:
            raster = raster_of(places)
            h, w = raster.shape
            whole = torch.equal(raster.flatten(), torch.arange(len(segments)))
            found.append(Raster(raster, small_grid(h, w, share), share, whole))
    keep, order = torch.cat([*(raster.centres for raster in found), newlines]).sort()
    sorted_already = torch.equal(order, torch.arange(len(order)))
    return Layout(tuple(found), newlines, keep, None if sorted_already else order)


def _raster(crops: CropLayout, places: Tensor) -> Tensor:
    # unpadded crops are a rectangle somewhere inside the encoder's grid
    row, col = crops.row[places], crops.col[places]
    row, col = row - row.min(), col - col.min()
    h, w = int(row.max()) + 1, int(col.max()) + 1
    order = (row * w + col).sort().indices
    if h * w != len(places) or not torch.equal((row * w + col)[order], torch.arange(h * w)):
        raise UnsupportedMethodError(
            f"grid methods need full rectangles, got {len(places)} tokens on {h} x {w}"
        )
    return places[order].view(h, w)


def sample(tokens: VisualTokens, num_keep: int) -> TokenPlan:
    """Keep the tokens at the centres of the new cells, as they are."""
    keep = sent(layout(tokens, num_keep).keep, tokens.features.device)
    return TokenPlan(keep=keep.expand(tokens.batch, -1))


def resample(tokens: VisualTokens, num_keep: int, shrink: Shrink, on: Values) -> TokenPlan:
    """Replace the tokens at the centres of the new cells by mixtures of their sub-image.

    Args:
        tokens: The bucket.
        num_keep: Upper bound of the count.
        shrink: Mixes one sub-image.
        on: What is mixed.
    """
    own = layout(tokens, num_keep)
    source = tokens.features if on == "features" else tokens.vision_features
    assert source is not None  # declared in `signals`
    device, parts = source.device, []
    for raster in own.found:
        x = source if raster.whole else source[:, sent(raster.places.flatten(), device)]
        parts.append(shrink(x, raster.size, raster.small).to(source.dtype))
    mixed = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    if on == "vision_features":
        assert tokens.projector is not None
        mixed = tokens.projector(mixed)
    values = mixed.to(tokens.features.dtype)
    if len(own.newlines):
        values = torch.cat([values, tokens.features[:, sent(own.newlines, device)]], dim=1)
    if own.order is not None:
        values = values[:, sent(own.order, device)]
    return TokenPlan(keep=sent(own.keep, device).expand(tokens.batch, -1), features=values)
