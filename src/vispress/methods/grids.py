"""Grid methods: each sub-image or frame goes to a smaller grid `h' x w'` of the same aspect.

The tokens at the centres of the new cells are the kept ones (uniform sampling); `resample` puts
values there that mix all tokens of the sub-image, each channel by itself. The product `h' w'`
seldom meets a budget exactly: it never exceeds it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import log
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.devices import sent
from vispress.errors import UnsupportedMethodError
from vispress.methods.base import segment_shares
from vispress.methods.segments import GEOMETRY
from vispress.types import Signal, TokenPlan, VisualTokens

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
    """

    places: Int[Tensor, "h w"]
    small: tuple[int, int]
    share: int

    @property
    def size(self) -> tuple[int, int]:
        """`(h, w)`."""
        h, w = self.places.shape
        return h, w

    @property
    def centres(self) -> Int[Tensor, "m"]:
        """Token nearest to the centre of each new cell, in raster order."""
        (h, w), (rows, cols) = self.places.shape, self.small
        return self.places[middles(h, rows)][:, middles(w, cols)].flatten()


def signals_for(on: Values) -> frozenset[Signal]:
    """What `resample` reads."""
    if on == "features":
        return GEOMETRY
    return GEOMETRY | {Signal.VISION_FEATURES, Signal.PROJECTOR}


def middles(large: int, small: int) -> Int[Tensor, "small"]:
    """Centres of `small` equal cells over `large` places: `floor((i + 0.5) large / small)`."""
    return (2 * torch.arange(small) + 1) * large // (2 * small)


def small_grid(h: int, w: int, num_keep: int) -> tuple[int, int]:
    """The grid of at most `num_keep` cells that cannot grow along either axis, closest in aspect.

    Ties: more cells, then fewer rows. `num_keep` must be at least 1.
    """
    grids = [(rows, min(w, num_keep // rows)) for rows in range(1, min(h, num_keep) + 1)]
    whole = [(r, c) for r, c in grids if r == h or (r + 1) * c > num_keep]
    # aspect to 9 digits: mirrored grids tie whatever the rounding of log
    return min(whole, key=lambda g: (round(abs(log(g[0] * w / (g[1] * h))), 9), -g[0] * g[1], g[0]))


def rasters(tokens: VisualTokens, num_keep: int) -> tuple[list[Raster], Int[Tensor, "newlines"]]:
    """Every sub-image with its new grid, and the newline tokens that are kept.

    Raises:
        UnsupportedMethodError: The tokens are no full grids (pruned before, or a ragged layout).
    """
    if tokens.num_visual != tokens.num_original or (tokens.grid is None and tokens.crops is None):
        raise UnsupportedMethodError(
            f"grid methods need whole images with a known grid, got {tokens.num_visual} of "
            f"{tokens.num_original} tokens, grid={tokens.grid}; let them act first"
        )
    segments = tokens.segments()[0]
    found, newlines = [], segments.new_empty(0)
    for segment, share in segment_shares(segments, num_keep).items():
        places = torch.where(segments == segment)[0]
        if segment == -1:
            newlines = places[:share]
        elif share:
            raster = _raster(tokens, places)
            h, w = raster.shape
            found.append(Raster(raster, small_grid(h, w, share), share))
    return found, newlines


def _raster(tokens: VisualTokens, places: Tensor) -> Tensor:
    if tokens.crops is None:
        assert tokens.grid is not None
        return places.view(tokens.grid[1:])
    # unpadded crops are a rectangle somewhere inside the encoder's grid
    row, col = tokens.crops.row[places], tokens.crops.col[places]
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
    found, newlines = rasters(tokens, num_keep)
    keep = torch.cat([*(raster.centres for raster in found), newlines]).sort().values
    return TokenPlan(keep=keep.to(tokens.features.device).expand(tokens.batch, -1))


def resample(tokens: VisualTokens, num_keep: int, shrink: Shrink, on: Values) -> TokenPlan:
    """Replace the tokens at the centres of the new cells by mixtures of their sub-image.

    Args:
        tokens: The bucket.
        num_keep: Upper bound of the count.
        shrink: Mixes one sub-image.
        on: What is mixed.
    """
    found, newlines = rasters(tokens, num_keep)
    source = tokens.features if on == "features" else tokens.vision_features
    assert source is not None  # declared in `signals`
    device = source.device
    mixed = torch.cat(
        [
            shrink(source[:, sent(raster.places.flatten(), device)], raster.size, raster.small)
            for raster in found
        ],
        dim=1,
    ).to(source.dtype)
    if on == "vision_features":
        assert tokens.projector is not None
        mixed = tokens.projector(mixed)
    values = torch.cat(
        [mixed.to(tokens.features.dtype), tokens.features[:, sent(newlines, device)]], 1
    )
    keep, order = torch.cat([*(raster.centres for raster in found), newlines]).sort()
    return TokenPlan(
        keep=sent(keep, device).expand(tokens.batch, -1), features=values[:, sent(order, device)]
    )
