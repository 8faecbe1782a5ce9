"""A preallocated cache layer that is allocated short, with a decode step that can be compiled.

The prefill goes the general way. A step of one token changes tensors in place and nothing else: no
device sync, no new Python objects, so a compiled step is traced once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from vispress.errors import CompressionStateError
from vispress.methods.cached_selector import Selection
from vispress.runtime.kv_cache.slots import CompressedLayerMixin, Slots, each


def _in_place(tensor: Tensor) -> Tensor:
    torch._dynamo.mark_static_address(tensor)
    return tensor


class CompressedStaticLayer(CompressedLayerMixin, StaticLayer):
    """What a `StaticCache` holds after a compressed prefill: capacity shrinks by what was dropped.

    Buffers, allocated with the keys (C is the short capacity): `slot_positions` `[B, C]` int64,
    `slot_valid` `[B, C]` bool (False where nothing is stored), `logical_length` int64 scalar.
    """

    logical_capacity: int
    slot_positions: Tensor
    slot_valid: Tensor
    logical_length: Tensor
    stepping: bool
    _slots: Slots

    @classmethod
    def upgrade(cls, layer: StaticLayer, slots: Slots) -> "CompressedStaticLayer":
        """Take over a plain layer that is still empty (buffers come with the first update)."""
        if slots.logical > 0:
            raise CompressionStateError(
                "a static cache that already holds tokens cannot be compressed by a later prefill; "
                "use a DynamicCache, or put all images into the first turn"
            )
        new = cls(max_cache_len=layer.max_cache_len)
        new.logical_capacity = layer.max_cache_len
        new._slots, new.pending, new.stepping = slots, None, False
        return new

    @property
    def slots(self) -> Slots:
        """What the slots hold now, read off the buffers (synchronises)."""
        if not self.is_initialized:
            return self._slots
        used = int(self.cumulative_length)
        return Slots(
            self.slot_positions[:, :used].clone(),
            self.slot_valid[:, :used].clone(),
            self._slots.shift,
            int(self.logical_length),
            self._slots.padded,
        )

    @slots.setter
    def slots(self, slots: Slots) -> None:
        self._slots = slots
        if self.is_initialized:
            self._write(slots)

    @property
    def last_stored(self) -> Slots:
        return self._slots

    @property
    def padded(self) -> bool:
        return self._slots.padded

    @property
    def physical(self) -> int:
        """Slots in use."""
        return int(self.cumulative_length) if self.is_initialized else 0

    def buffer(self, slots: Slots, new_rows: int) -> int:
        """Capacity: the whole buffer is handed to attention."""
        if self.is_initialized:
            return int(self.max_cache_len)
        return self.logical_capacity - (slots.logical - new_rows)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the physical rows of a chunk behind those in use."""
        if self.stepping:
            self.stepping = False
        else:
            slots = self._take_pending()
            if not self.is_initialized:
                dropped = slots.logical - key_states.shape[-2]
                self.max_cache_len = self.logical_capacity - dropped
                self._allocate(slots)
            self._slots = slots
            self._write(slots)
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys, values

    def expect_nothing(self) -> None:
        """Take back a token's slot too, ahead of its keys and values."""
        super().expect_nothing()
        self.stepping = False

    def step(self) -> Tensor:
        """Take in one token's slot, ahead of its keys and values.

        Returns:
            `[B, C]` bool, the slots it may attend to.
        """
        here = self.cumulative_length.view(1)
        now = self.logical_length.view(1, 1).expand(self.slot_positions.shape[0], 1)
        self.slot_positions.index_copy_(1, here, now)
        self.slot_valid.index_fill_(1, here, True)
        self.logical_length.add_(1)
        self.stepping = True
        return self.slot_valid

    def stored(self) -> tuple[Tensor, Tensor | None]:
        """`[B, C]` positions of all slots, and which of them hold something."""
        return self.slot_positions, self.slot_valid

    def coming(self) -> Tensor:
        """`[B, C]` positions of all slots (a step's are in), or of those a chunk will fill."""
        return self.slot_positions if self.pending is None else self.pending.positions

    def selected(self, states: Sequence[Selection]) -> None:
        """Write the state behind a call in place, where a compiled step finds it again."""
        if self.selection is None:
            self.selection = states[-1]
            if not torch.compiler.is_compiling():
                each(self.selection, _in_place)
            return
        self.selection.attention.copy_(states[-1].attention)
        self.selection.selected.copy_(states[-1].selected)
        self.selection.begun.copy_(states[-1].begun)

    def _allocate(self, slots: Slots) -> None:
        batch, device = slots.positions.shape[0], slots.positions.device
        self.slot_positions = torch.zeros(
            batch, self.max_cache_len, dtype=torch.long, device=device
        )
        self.slot_valid = torch.zeros(batch, self.max_cache_len, dtype=torch.bool, device=device)
        self.logical_length = torch.zeros((), dtype=torch.long, device=device)
        if not torch.compiler.is_compiling():
            for tensor in (self.slot_positions, self.slot_valid, self.logical_length):
                torch._dynamo.mark_static_address(tensor)

    def _write(self, slots: Slots) -> None:
        used = slots.size
        self.slot_positions[:, :used] = slots.positions
        self.slot_valid.zero_()
        self.slot_valid[:, :used] = True if slots.valid is None else slots.valid
        self.logical_length.fill_(slots.logical)

    def get_seq_length(self) -> Any:
        """Logical length (a tensor once allocated, as in `StaticLayer`)."""
        return self.logical_length if self.is_initialized else self._slots.logical

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Logical capacity: transformers sizes static masks by it."""
        return self.logical_capacity, 0

    def get_max_length(self) -> int:
        """Logical capacity."""
        return self.logical_capacity

    def get_max_cache_shape(self) -> int:
        """Logical capacity (the name older transformers use)."""
        return self.logical_capacity

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch (beam search)."""
        if not self.is_initialized:
            return
        assert self.keys is not None
        assert self.values is not None
        index = beam_idx.to(self.keys.device)
        self.keys, self.values = self.keys[index], self.values[index]
        self.slot_positions, self.slot_valid = self.slot_positions[index], self.slot_valid[index]
        self._slots = self._slots.select(beam_idx)
        self.map_selection(beam_idx)

    def reset(self) -> None:
        """Forget all tokens and free the short buffer: the next prefill may keep another number."""
        capacity, batch = self.logical_capacity, self._slots.positions.shape[0]
        empty = torch.zeros(batch, 0, dtype=torch.long, device=self._slots.positions.device)
        self.__dict__.clear()
        self.__dict__.update(StaticLayer(max_cache_len=capacity).__dict__)
        self.logical_capacity, self.stepping = capacity, False
        self._slots, self.pending = Slots(empty, None, None, 0), None
