"""What the physical slots of a short cache layer hold, and what all short layers share."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from vispress.errors import CompressionStateError
from vispress.methods.cached_selector import Selection
from vispress.runtime.kv_cache.pair_memory import PairMemory

_AHEAD = 64
"""Decode steps that places are made for at once."""


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

    def __init__(
        self,
        positions: Tensor,
        valid: Tensor | None,
        shift: Tensor | None,
        logical: int,
        padded: bool = False,
    ) -> None:
        self.shift, self.logical, self.padded = shift, logical, padded
        self.size, self.all_valid = positions.shape[1], valid is None
        # places of later tokens may stand behind them, and those of the last ones may not be made
        self._positions, self._valid = positions, valid
        self._selected: list[tuple[Tensor, Slots]] = []
        self._later: dict[int, Slots] = {}
        self._newest: list[int] | None = None

    @property
    def positions(self) -> Tensor:
        """`[B, P]` int64, logical position of each slot."""
        if self._positions.shape[1] < self.size:
            self._make_places()
        held = self._positions
        return held if held.shape[1] == self.size else held[:, : self.size]

    @property
    def valid(self) -> Tensor | None:
        """`[B, P]` bool, slots that hold real tokens; None for all."""
        if self._valid is not None and self._valid.shape[1] < self.size:
            self._make_places()
        held = self._valid
        return held if held is None or held.shape[1] == self.size else held[:, : self.size]

    def _make_places(self) -> None:
        """Make the places of tokens that came since, and of some that will: seldom."""
        first = self.logical - (self.size - self._positions.shape[1])
        later = torch.arange(first, self.logical + _AHEAD, device=self._positions.device)
        later = later.expand(len(self._positions), -1)
        self._positions = torch.cat([self._positions, later], dim=1)
        if self._valid is not None:
            true = torch.ones_like(later, dtype=torch.bool)
            self._valid = torch.cat([self._valid, true], dim=1)

    def with_step(self) -> "Slots":
        """These slots, and behind them one more token of each sample, which is no padding."""
        later = Slots(self._positions, self._valid, self.shift, self.logical + 1, self.padded)
        later.size = self.size + 1
        return later

    def with_steps(self, count: int) -> "Slots":
        """These slots, and behind them some more tokens of each sample, likewise."""
        later = Slots(self._positions, self._valid, self.shift, self.logical + count, self.padded)
        later.size = self.size + count
        return later

    def newest(self) -> list[int]:
        """For each slot, the latest position that a sample has there, or -1: waits, but once."""
        if self._newest is None:
            held, valid = self.positions, self.valid
            held = held if valid is None else held.masked_fill(~valid, -1)
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
        if before.size:
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
            rows = index.to(self._positions.device)
            valid, shift = (None if x is None else x[rows] for x in (self._valid, self.shift))
            new = Slots(self._positions[rows], valid, shift, self.logical)
            new.size = self.size
            self._selected[:] = [(index, new)]
        return self._selected[0][1]

    def repeat(self, repeats: int) -> "Slots":
        """Each row of the batch `repeats` times."""
        rows = torch.arange(len(self._positions), device=self._positions.device)
        return self.select(rows.repeat_interleave(repeats))


def each(selection: Selection, change: Callable[[Tensor], Tensor]) -> Selection:
    """The selection with every tensor changed."""
    return replace(
        selection, **{f.name: change(getattr(selection, f.name)) for f in fields(selection)}
    )


def rows_of(selection: Selection, index: Tensor) -> Selection:
    """Rows of the batch by index."""
    return each(selection, lambda tensor: tensor[index])


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
    def last_stored(self) -> Slots:
        """The slots behind the last call of several tokens; waits for nothing."""
        return self.slots

    @property
    def padded(self) -> bool:
        """Whether a mask hid tokens that came, as the slots say; waits for nothing."""
        return self.slots.padded

    @property
    def physical(self) -> int:
        """Slots in use."""
        return self.slots.size

    def expect(self, slots: Slots) -> None:
        """Say what the layer holds once the coming chunk is stored."""
        self.pending = slots

    def expect_nothing(self) -> None:
        """Take back what was expected of a call that ended before the layer was reached."""
        self.pending = None

    def store_nothing(self) -> None:
        """Take in what was expected, tokens of which none has a row."""
        self.slots = self._take_pending()

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
        return slots.size

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
