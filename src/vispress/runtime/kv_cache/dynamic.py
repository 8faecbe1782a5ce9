"""Cache layers that report logical lengths and store physical ones.

A layer of the user's cache object is replaced in place when a prefill compresses. Outside, its
length is that of the full sequence; inside it holds the rows that live at that depth, with the
logical position and validity of each slot.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from vispress.errors import CompressionStateError
from vispress.runtime.kv_cache.slots import CompressedLayerMixin, Slots


class ForgettingLayer(DynamicLayer):
    """A growing layer that `reset` empties, in every release of transformers."""

    keys: Tensor | None
    values: Tensor | None

    def reset(self) -> None:
        """Forget all tokens."""
        self.keys = self.values = None
        self.is_initialized = False
        super().reset()


class ForgettingSlidingLayer(ForgettingLayer, DynamicSlidingWindowLayer):
    """The same of a sliding window."""


class CompressedDynamicLayer(CompressedLayerMixin, ForgettingLayer):
    """A growing layer; what `DynamicCache` holds after a compressed prefill."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the physical rows of a chunk."""
        if self.pending is None:
            self._take_pending()  # says what is wrong
        else:
            self.slots, self.pending = self.pending, None
        if self.keys is None or self.values is None or not self.is_initialized:
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            return keys, values
        # each step of each layer comes here: not one call more than the plain layer's
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        return self.keys, self.values

    def reset(self) -> None:
        """Forget all tokens; the layer stays usable with a compressed model."""
        super().reset()
        device = self.slots.positions.device
        batch = self.slots.positions.shape[0]
        empty = torch.zeros(batch, 0, dtype=torch.long, device=device)
        self.slots, self.pending = Slots(empty, None, None, 0), None
        self.selection, self.trail, self.pairs = None, (), None

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens (assisted decoding); only tokens behind the last image.

        Raises:
            CompressionStateError: The cut would reach into compressed rows.
        """
        count = crop_count(tokens_to_remove, self.slots.logical)
        if count == 0:
            return
        tail = self.slots.positions[:, -count:]
        wanted = torch.arange(self.slots.logical - count, self.slots.logical, device=tail.device)
        if tail.shape[1] != count or not bool((tail == wanted).all()):
            raise CompressionStateError(
                f"cannot crop {count} tokens from a compressed cache: the cut reaches into rows "
                "from which "
                "visual tokens were dropped"
            )
        self._take_back(count)
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self.keys[..., :-count, :], self.values[..., :-count, :]
        slots = self.slots
        if self.pairs is not None:
            self.pairs = self.pairs.crop(self.physical - count)
        self.slots = Slots(
            slots.positions[:, :-count],
            None if slots.valid is None else slots.valid[:, :-count],
            slots.shift,
            slots.logical - count,
            slots.padded,
        )

    def _take_back(self, count: int) -> None:
        """What deeper layers saw before the last tokens; known for those of the last call."""
        if self.selection is None:
            return
        if count > len(self.trail):
            raise CompressionStateError(
                f"cannot crop {count} tokens from this cache: which cached tokens deeper layers "
                f"see while decoding is known before the last {len(self.trail)} only; crop what "
                "the last call added, or compress with dynamic=False"
            )
        *self.trail, self.selection = list(self.trail)[: len(self.trail) - count + 1]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence (contrastive and beam decoding)."""
        batch = self.slots.positions.shape[0]
        super().batch_repeat_interleave(repeats)
        self.slots = self.slots.repeat(repeats)
        self.map_selection(torch.arange(batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences of the batch."""
        super().batch_select_indices(indices)
        self.slots = self.slots.select(indices)
        self.map_selection(indices)


def crop_count(tokens_to_remove: int, logical: int) -> int:
    """Tokens to drop: a negative count, or (transformers 5.17) the positive length to keep."""
    if tokens_to_remove > 0:
        return max(0, logical - tokens_to_remove)
    return min(logical, -tokens_to_remove)
