"""What the physical slots of a short cache layer hold, and what all short layers share."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from vispress.errors import CompressionStateError


@dataclass
class Slots:
    """What the physical slots of one cache layer hold; shared by layers with the same rows.

    Args:
        positions: `[B, P]` int64, logical position of each slot, ascending along valid slots.
        valid: `[B, P]` bool, or None when every slot holds a real token.
        shift: `[B]` int64, how much smaller the position ids of later tokens are (compact), or
            None.
        logical: Logical length.
    """

    positions: Tensor
    valid: Tensor | None
    shift: Tensor | None
    logical: int

    def select(self, index: Tensor) -> "Slots":
        """Rows of the batch by index."""
        index = index.to(self.positions.device)
        return Slots(
            self.positions[index],
            None if self.valid is None else self.valid[index],
            None if self.shift is None else self.shift[index],
            self.logical,
        )

    def repeat(self, repeats: int) -> "Slots":
        """Each row of the batch `repeats` times."""
        rows = torch.arange(self.positions.shape[0], device=self.positions.device)
        return self.select(rows.repeat_interleave(repeats))


class Compressed(CacheLayerMixin):
    """The part that both kinds share."""

    pending: Slots | None
    keys: Tensor | None
    values: Tensor | None
    _slots: Slots

    @property
    def slots(self) -> Slots:
        """What the physical slots hold."""
        return self._slots

    @slots.setter
    def slots(self, slots: Slots) -> None:
        self._slots = slots

    @property
    def physical(self) -> int:
        """Slots in use."""
        return self.slots.positions.shape[1]

    def expect(self, slots: Slots) -> None:
        """Say what the layer holds once the coming chunk is stored."""
        self.pending = slots

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
