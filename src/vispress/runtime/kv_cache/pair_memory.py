"""Hold what a mask of pairs needs of earlier rows: how text attended to images, and where."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


def _joined(
    before: tuple[Tensor, Tensor | None], here: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """Slots and which are valid (None: all), `[B, P]` and `[B, Q]`, one behind the other."""
    slots = torch.cat([before[0], here[0]], dim=1)
    if before[1] is None and here[1] is None:
        return slots, None
    marks = [
        torch.ones_like(places, dtype=torch.bool) if valid is None else valid
        for places, valid in (before, here)
    ]
    return slots, torch.cat(marks, dim=1)


@dataclass(frozen=True, eq=False)
class PairSlots:
    """Slots of text rows and of visual tokens; one object for layers that hold the same.

    Args:
        text: `[B, T]` int64.
        text_valid: `[B, T]` bool, False on padding; None for no padding.
        image: `[B, N]` int64.
        image_valid: `[B, N]` bool, likewise.
    """

    text: Tensor
    text_valid: Tensor | None
    image: Tensor
    image_valid: Tensor | None
    _selected: list[tuple[Tensor, "PairSlots"]] = field(default_factory=list)

    def behind(self, before: "PairSlots | None", offset: int) -> "PairSlots":
        """These places in a chunk, whose first row is slot `offset`, and what stood before."""
        text, image = (
            (self.text + offset, self.image + offset) if offset else (self.text, self.image)
        )
        if before is None:
            return PairSlots(text, self.text_valid, image, self.image_valid)
        return PairSlots(
            *_joined((before.text, before.text_valid), (text, self.text_valid)),
            *_joined((before.image, before.image_valid), (image, self.image_valid)),
        )

    def select(self, index: Tensor) -> "PairSlots":
        """Rows of the batch by index; one object for layers that share this one."""
        if not self._selected or self._selected[0][0] is not index:
            rows = index.to(self.text.device)
            texts, images = (
                None if x is None else x[rows] for x in (self.text_valid, self.image_valid)
            )
            new = PairSlots(self.text[rows], texts, self.image[rows], images)
            self._selected[:] = [(index, new)]
        return self._selected[0][1]


@dataclass(eq=False)
class PairMemory:
    """How the text rows of a cache layer attended to its visual tokens, before any mask of pairs.

    Each layer has its own, on which a step of one token writes.

    Args:
        slots: Where both stand.
        attention: `[B, T, N]` in at least fp32, mean over heads; 0 on padding.
    """

    slots: PairSlots
    attention: Tensor

    def select(self, index: Tensor) -> "PairMemory":
        """Rows of the batch by index."""
        return PairMemory(self.slots.select(index), self.attention[index.to(self.attention.device)])

    def crop(self, slots: int) -> "PairMemory":
        """Without what is stored behind the first `slots`."""
        held = self.slots
        text, image = held.text < slots, held.image < slots
        text = text if held.text_valid is None else text & held.text_valid
        image = image if held.image_valid is None else image & held.image_valid
        rows, columns = text.any(0), image.any(0)
        seen = self.attention * text[:, :, None] * image[:, None]
        # padding may stand anywhere, but not on slots that are gone
        left = PairSlots(
            (held.text * text)[:, rows], text[:, rows],
            (held.image * image)[:, columns], image[:, columns],
        )  # fmt: skip
        return PairMemory(left, seen[:, rows][:, :, columns])
