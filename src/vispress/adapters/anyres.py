"""AnyRes: a thumbnail and a grid of crops, stitched, unpadded and broken by newline tokens."""

from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vispress.adapters.base import Modality
from vispress.adapters.towers import Layout, TowerAdapter
from vispress.errors import UnsupportedModelError
from vispress.types import CropLayout, Need

MOST_LAYOUTS = 64
"""Sizes of images whose layouts are kept."""


class AnyResAdapter(TowerAdapter):
    """Values travel through the model's own `pack_image_features`, with zeros for newlines."""

    kinds: ClassVar[frozenset[Need]] = frozenset({"anyres"})

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self._layouts: dict[Hashable, Sequence[Layout]] = {}

    @abstractmethod
    def _crops(self, call: Mapping[str, Any]) -> list[int]:
        """Encoder sequences of each image, the thumbnail included."""

    @abstractmethod
    def _stitch(
        self, images: Sequence[Tensor], call: Mapping[str, Any], *, resize: bool = True
    ) -> list[Tensor]:
        """The model's packing of `[crops, n, C]` an image; `resize=False`: never interpolate."""

    def sequences(
        self, modality: Modality, call: Mapping[str, Any], length: int
    ) -> Sequence[Sequence[int]]:
        """One a crop."""
        return [[length] * crops for crops in self._crops(call)]

    def pack(
        self, modality: Modality, values: Tensor, call: Mapping[str, Any]
    ) -> tuple[Tensor, ...]:
        """Stitch and unpad as the model does."""
        return tuple(self._stitch(torch.split(values, self._crops(call)), call))

    def merged_images(
        self, modality: Modality, call: Mapping[str, Any], runs: Sequence[int], *, geometry: bool
    ) -> tuple[Sequence[int], Mapping[str, Any]]:
        """Count the tokens of each image by its size."""
        sizes = call.get("image_sizes")
        if modality == "video" or sizes is None:
            raise UnsupportedModelError(
                f"{self.family}: {modality}s merged into inputs_embeds cannot be told apart; pass "
                f"{'pixel values' if modality == 'video' else 'image_sizes beside them'}"
            )
        call = {**call, "image_sizes": torch.as_tensor(sizes).cpu()}
        crops = self._crops(call)
        ones = torch.ones(sum(crops), self._side**2, 1)
        return [len(shown) for shown in self._stitch(torch.split(ones, crops), call)], call

    def layouts(
        self, modality: Modality, counts: Sequence[int], call: Mapping[str, Any]
    ) -> Sequence[Layout]:
        """Crops from packing indices; for images that the model resizes, by nearest neighbour.

        Resized tokens (OneVision beyond its limit of crops) are mixtures; such a token belongs to
        the crop that holds its centre, and its row and column count resized tokens in that crop.
        """
        crops = self._crops(call)
        sizes = tuple(tuple(int(edge) for edge in size) for size in call["image_sizes"])
        default = getattr(self.base.config, "vision_aspect_ratio", None)
        limit = call.get("vision_aspect_ratio") or default
        key = (sizes, tuple(crops), tuple(counts), self._side, limit)
        if (known := self._layouts.get(key)) is None:
            if len(self._layouts) >= MOST_LAYOUTS:
                self._layouts.clear()
            known = self._layouts[key] = self._traced(crops, counts, call)
        return known

    def _traced(
        self, crops: list[int], counts: Sequence[int], call: Mapping[str, Any]
    ) -> Sequence[Layout]:
        places = torch.arange(1, sum(crops) * self._side**2 + 1, dtype=torch.float64)
        split = torch.split(places.view(-1, self._side**2, 1), crops)
        traced = self._stitch(split, call, resize=False)
        shown = self._stitch([torch.ones_like(part) for part in split], call)
        layouts: list[Layout] = []
        for count, part, trace, mark in zip(counts, split, traced, shown, strict=True):
            if len(mark) != count:
                raise UnsupportedModelError(
                    f"an image of {count} visual tokens should have {len(mark)} by its size"
                )
            # place of each token among the image's crops; -1 is a newline
            place = torch.where(trace > 0, trace - part.min(), -1)[:, 0].long()
            if len(place) == count:
                layouts.append((None, self._layout(place)))
            else:
                layouts.append((None, self._resized(place, mark[:, 0] > 0)))
        return layouts

    def _layout(self, place: Tensor) -> CropLayout:
        size = self._side**2
        newline = place < 0
        segment = torch.where(newline, -1, place // size)
        row = torch.where(newline, -1, place % size // self._side)
        col = torch.where(newline, -1, place % self._side)
        return CropLayout(segment=segment, row=row, col=col, thumbnail=True)

    def _resized(self, place: Tensor, visual: Tensor) -> CropLayout:
        """Layout of a thumbnail and a resized grid, from the places before resizing.

        Args:
            place: `[N']` places of the grid as it was before, newlines -1.
            visual: `[N]` bool, False on newlines of the resized grid.
        """
        thumbnail = self._side**2
        base = self._layout(place[:thumbnail])
        before = _unbroken(place[thumbnail:], place[thumbnail:] >= 0)
        after = _unbroken(torch.arange(len(visual) - thumbnail), visual[thumbnail:])
        rows = _nearest(len(after), len(before))
        cols = _nearest(after.shape[1], before.shape[1])
        whole = self._layout(before[rows][:, cols].flatten())
        grid = [whole.segment, *_inside(whole.segment.view(after.shape))]
        parts = []
        for first, values in zip((base.segment, base.row, base.col), grid, strict=True):
            newlines = torch.full((len(after), 1), -1)
            broken = torch.cat([values.view(after.shape), newlines], dim=1)
            parts.append(torch.cat([first, broken.flatten()]))
        return CropLayout(segment=parts[0], row=parts[1], col=parts[2], thumbnail=True)


def _unbroken(values: Tensor, visual: Tensor) -> Tensor:
    """`[h * (w + 1)]` with a newline behind each row, as `[h, w]`."""
    height = int((~visual).sum())
    return values.view(height, -1)[:, :-1]


def _nearest(small: int, large: int) -> Tensor:
    """`[small]` places of `large` that hold the centres of `small` equal cells."""
    return (2 * torch.arange(small) + 1) * large // (2 * small)


def _inside(segment: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of each place of `[h, w]` segments, counted from its segment's first."""
    h, w = segment.shape
    row = torch.arange(h)[:, None].expand(h, w)
    col = torch.arange(w).expand(h, w)
    first_row, first_col = torch.zeros_like(row), torch.zeros_like(col)
    for each in torch.unique(segment):
        inside = segment == each
        first_row = torch.where(inside, row[inside].min(), first_row)
        first_col = torch.where(inside, col[inside].min(), first_col)
    return row - first_row, col - first_col
