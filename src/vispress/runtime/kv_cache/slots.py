"""What the physical slots of a short cache layer hold, and what all short layers share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from vispress.errors import CompressionStateError
from vispress.methods.cached_selector import Selection


@dataclass
class Slots:
    """What the physical slots of one cache layer hold; shared by layers with the same rows.

    Args:
        positions: `[B, P]` int64, logical position of each slot, ascending along valid slots.
        valid: `[B, P]` bool, or None when every slot holds a real token.
        shift: `[B]` int64, how much smaller the position ids of later tokens are (compact), or
            None.
        logical: Logical length.
        padded: Whether a mask hid tokens when they came, which are not stored and can never be
            shown; not known any more once rows were selected.
    """

    positions: Tensor
    valid: Tensor | None
    shift: Tensor | None
    logical: int
    padded: bool = False
    _selected: list[tuple[Tensor, "Slots"]] = field(default_factory=list)
    _later: dict[int, "Slots"] = field(default_factory=dict)
    _newest: list[int] | None = None

    def newest(self) -> list[int]:
        """For each slot, the latest position that a sample has there, or -1: waits, but once."""
        if self._newest is None:
            held = self.positions
            held = held if self.valid is None else held.masked_fill(~self.valid, -1)
            self._newest = held.amax(dim=0).tolist()
        return self._newest

    def from_slot(self, start: int) -> "Slots":
        """Leave out the first slots; one object for layers that share this one."""
        if start not in self._later:
            valid = None if self.valid is None else self.valid[:, start:]
            self._later[start] = Slots(
                self.positions[:, start:], valid, self.shift, self.logical, self.padded
            )
        return self._later[start]

    def behind(self, before: "Slots | None") -> "Slots":
        """These slots of a chunk, stored behind what the layer held."""
        if before is None:
            return self
        positions, valid, shift = self.positions, self.valid, self.shift
        if before.positions.shape[1]:
            old = before.valid
            if old is not None or valid is not None:
                old = torch.ones_like(before.positions, dtype=torch.bool) if old is None else old
                new = torch.ones_like(positions, dtype=torch.bool) if valid is None else valid
                valid = torch.cat([old.to(new.device), new], dim=1)
            positions = torch.cat([before.positions.to(positions.device), positions], dim=1)
        if before.shift is not None:
            old_shift = before.shift.to(positions.device)
            shift = old_shift if shift is None else shift + old_shift
        return Slots(positions, valid, shift, self.logical, self.padded or before.padded)

    def select(self, index: Tensor) -> "Slots":
        """Rows of the batch by index; one object for layers that share this one."""
        if not self._selected or self._selected[0][0] is not index:
            rows = index.to(self.positions.device)
            valid, shift = (None if x is None else x[rows] for x in (self.valid, self.shift))
            self._selected[:] = [(index, Slots(self.positions[rows], valid, shift, self.logical))]
        return self._selected[0][1]

    def repeat(self, repeats: int) -> "Slots":
        """Each row of the batch `repeats` times."""
        rows = torch.arange(self.positions.shape[0], device=self.positions.device)
        return self.select(rows.repeat_interleave(repeats))


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


def each(selection: Selection, change: Callable[[Tensor], Tensor]) -> Selection:
    """The selection with every tensor changed."""
    return replace(
        selection, **{f.name: change(getattr(selection, f.name)) for f in fields(selection)}
    )


def rows_of(selection: Selection, index: Tensor) -> Selection:
    """Rows of the batch by index."""
    return each(selection, lambda tensor: tensor[index])


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


@dataclass(frozen=True, eq=False)
class PairMemory:
    """How the text rows of a cache layer attended to its visual tokens, before any mask of pairs.

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


class CompressedLayerMixin(CacheLayerMixin):
    """The part that both kinds share."""

    selection: Selection | None = None
    """What deeper layers see while decoding; kept by the layer whose attention is read."""
    trail: Sequence[Selection] = ()
    """The same before each token of the last call, so that these can be taken back."""
    pairs: PairMemory | None = None
    """What a mask of pairs needs of earlier rows; kept by every layer that has one."""
    logical_capacity: int | None = None
    """Of a preallocated layer: logical tokens that it was asked to hold."""
    keeps_all: bool = False
    """Whether what is out of a sliding window stays: something counts its slots."""
    attended: Slots | None = None
    """What attention was given by the last call, where the slots hold less by now."""
    pending: Slots | None
    keys: Tensor | None
    values: Tensor | None
    slots: Slots
    """What the physical slots hold; a preallocated layer reads it off its buffers."""

    @property
    def padded(self) -> bool:
        """Whether a mask hid tokens that came, as the slots say; waits for nothing."""
        return self.slots.padded

    @property
    def physical(self) -> int:
        """Slots in use."""
        return self.slots.positions.shape[1]

    def expect(self, slots: Slots) -> None:
        """Say what the layer holds once the coming chunk is stored."""
        self.pending = slots

    def expect_nothing(self) -> None:
        """Take back what was expected of a call that ended before the layer was reached."""
        self.pending = None

    def coming(self) -> Tensor:
        """`[B, P]` logical positions of the slots, those of the chunk to be stored included."""
        return (self.slots if self.pending is None else self.pending).positions

    def stored(self) -> tuple[Tensor, Tensor | None]:
        """`[B, P]` logical positions of the slots as they are, and which are valid."""
        return self.slots.positions, self.slots.valid

    def selected(self, states: Sequence[Selection]) -> None:
        """Note the state before each token of a call, and (the last) behind it."""
        *self.trail, self.selection = states

    def map_selection(self, index: Tensor) -> None:
        """Rows of the batch by index, of all that is remembered beside the slots."""
        if self.pairs is not None:
            self.pairs = self.pairs.select(index)
        if self.selection is not None:
            index = index.to(self.selection.begun.device)
            self.selection = rows_of(self.selection, index)
            self.trail = [rows_of(one, index) for one in self.trail]

    def buffer(self, slots: Slots, new_rows: int) -> int:
        """Length of the key tensor that `update` will return once `slots` are stored."""
        return slots.positions.shape[1]

    def _take_pending(self) -> Slots:
        if self.pending is None:
            raise CompressionStateError(
                "this KV cache was filled by a compressed model, and the model that now uses it "
                "does not know which tokens it holds: compression was removed, or it is another "
                "model. Start with a new cache"
            )
        pending, self.pending = self.pending, None
        return pending

    def get_seq_length(self) -> int:
        """Logical length."""
        return self.slots.logical

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Logical key length and offset; the runtime cuts the mask for each layer."""
        return self.slots.logical + int(query_length), 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch (beam search)."""
        if self.slots.logical > 0:
            assert self.keys is not None
            assert self.values is not None
            self.keys = self.keys.index_select(0, beam_idx.to(self.keys.device))
            self.values = self.values.index_select(0, beam_idx.to(self.values.device))
            self.slots = self.slots.select(beam_idx)
            self.map_selection(beam_idx)
