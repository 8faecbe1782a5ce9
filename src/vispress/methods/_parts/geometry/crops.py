"""How an AnyRes image was cut: its grid of crops and what of it is visible after unpadding."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from vispress.methods.base import remembered
from vispress.types import CropLayout


@dataclass(frozen=True)
class Cut:
    """Geometry on the host.

    Args:
        side: Rows and columns of the thumbnail.
        rows: Crops along the height.
        cols: Crops along the width.
        height: Rows of visible crop tokens.
        width: Columns of visible crop tokens.
        crops: `[v]`; crop of each visible token, in raster order, counted from 0.
    """

    side: int
    rows: int
    cols: int
    height: int
    width: int
    crops: Int[Tensor, "v"]

    @cached_property
    def places(self) -> list[Int[Tensor, "n"]]:
        """Visible tokens of each crop (perhaps none), counted in raster order."""
        return [torch.where(self.crops == crop)[0] for crop in range(self.rows * self.cols)]


@remembered
def cut_of(layout: CropLayout) -> Cut | None:
    """Recover the cut of a whole image; None where it is no thumbnail with crops behind it."""
    thumbnail, visible = layout.segment == 0, layout.segment > 0
    side = int(layout.row[thumbnail].max()) + 1 if bool(thumbnail.any()) else 0
    if not bool(visible.any()) or int(thumbnail.sum()) != side * side:
        return None
    segment, row, col = (x[visible] for x in (layout.segment, layout.row, layout.col))
    # the next row begins where the first token's column of its crop row or the one below returns
    again = torch.where((col == col[0]) & ((segment != segment[0]) | (row != row[0])))[0]
    width = next((i for i in again.tolist() if _below(segment, row, i)), len(segment))
    grid = segment.view(-1, width)
    down, across = torch.unique(grid[:, 0]), torch.unique(grid[0])
    cols = int(down[1] - down[0]) if len(down) > 1 else len(across)
    return Cut(
        side=side,
        rows=-(-int(segment.max()) // cols),
        cols=cols,
        height=len(grid),
        width=width,
        crops=segment - 1,
    )


def resized(thumbnail: Float[Tensor, "B s s"], cut: Cut) -> Float[Tensor, "B v"]:
    """Resize the thumbnail's scores to the visible crop tokens (bilinear)."""
    size = (cut.height, cut.width)
    whole = F.interpolate(thumbnail[:, None], size=size, mode="bilinear", align_corners=False)
    return whole.flatten(1)


def guided_score(
    local: Float[Tensor, "B v"], thumbnail: Float[Tensor, "B s s"], cut: Cut
) -> Float[Tensor, "B v"]:
    """Add own and thumbnail scores of visible crop tokens, each over its norm in the crop."""
    shared, score = resized(thumbnail, cut), torch.zeros_like(local)
    for places in cut.places:
        own, guide = (F.normalize(part[:, places], dim=1) for part in (local, shared))
        score[:, places] = own + guide
    return score


def _below(segment: Tensor, row: Tensor, i: int) -> bool:
    """Tell whether token `i` stands one row below the first one."""
    same_crop = bool(segment[i] == segment[0]) and bool(row[i] == row[0] + 1)
    return same_crop or (bool(segment[i] > segment[0]) and bool(row[i] == 0) and bool(row[0] > 0))
