"""A growing cache layer that holds what a sliding window may still see, by logical position.

transformers counts the slots of such a layer and keeps the latest. Where tokens were dropped from
the middle, slots and positions part: a window of 8 positions may hold 3 slots. So slots leave by
position, which is known on the host: read once behind a prefill that dropped tokens, counted on
from there, so that decoding never waits for the device.
"""

from collections import deque
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from vispress.errors import CompressionStateError
from vispress.runtime.kv_cache.dynamic import CompressedDynamicLayer, crop_count
from vispress.runtime.kv_cache.slots import Slots


class CompressedSlidingLayer(CompressedDynamicLayer, DynamicSlidingWindowLayer):
    """What a `DynamicCache` of a model with sliding windows holds after a compressed prefill.

    Length and mask sizes are those that the plain layer would report.

    Attributes:
        newest: For each slot, the latest logical position that a sample has there.
        lost: Tokens at this logical position and behind it are all there, if they were not dropped.
    """

    newest: deque[int]
    lost: int

    @classmethod
    def upgrade(cls, layer: DynamicLayer, slots: Slots) -> "CompressedSlidingLayer":
        """Take over the keys and values of a plain layer that its window may still see."""
        assert isinstance(layer, DynamicSlidingWindowLayer)
        new = cls(sliding_window=layer.sliding_window)
        new.__dict__.update(layer.__dict__)
        new.slots, new.pending = slots, None
        count = slots.size
        if new.keys is not None and new.values is not None:  # more, if it records its past
            start = new.keys.shape[2] - count
            new.keys, new.values = new.keys[:, :, start:], new.values[:, :, start:]
        new.lost = slots.logical - count
        new.newest = deque(range(new.lost, slots.logical))
        return new

    def __copy__(self) -> "CompressedSlidingLayer":
        """Give a layer whose growth does not reach this one."""
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.newest = deque(self.newest)
        return new

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the physical rows of a chunk, then let go of what no later token sees."""
        past, slots = self.slots.logical, self._take_pending()
        if key_states.shape[-2] == slots.logical - past:  # a row for every position
            self.newest.extend(range(past, slots.logical))
        else:
            self.newest = deque(slots.newest())
        keys, values = DynamicLayer.update(self, key_states, value_states, *args, **kwargs)
        self.slots = self.attended = slots
        if not self.record_past:
            self._trim()
        return keys, values

    def stored(self) -> tuple[Tensor, Tensor | None]:
        """`[B, P]` logical positions of the slots that attention was given, and which are valid."""
        slots = self.slots if self.attended is None else self.attended
        return slots.positions, slots.valid

    def _trim(self) -> None:
        """Let go of slots that are out of the window of the next token, of whatever sample."""
        self.cumulative_length = self.slots.logical
        first, gone = self._first(), 0
        while not self.keeps_all and self.newest and self.newest[0] < first:
            self.lost = max(self.lost, self.newest.popleft() + 1)
            gone += 1
        if not gone:
            return
        assert self.keys is not None
        assert self.values is not None
        self.slots = self.slots.from_slot(gone)
        self.keys, self.values = self.keys[:, :, gone:], self.values[:, :, gone:]
        if gone > 1:  # a view would keep the whole prefill in memory until the next step
            self.keys, self.values = self.keys.clone(), self.values.clone()

    def _first(self) -> int:
        """First logical position that the next token sees."""
        return max(self.slots.logical - int(self.sliding_window) + 1, 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Logical key length and offset within the window."""
        first = self._first()
        return self.slots.logical + int(query_length) - first, first

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens (assisted decoding), and what is out of the window then.

        Raises:
            CompressionStateError: The window in front of them is not held any more, or the cut
                would reach into compressed rows.
        """
        count = crop_count(tokens_to_remove, self.slots.logical)
        if count and self._first() - count < self.lost and self.lost > 0:
            raise CompressionStateError(
                f"cannot crop {count} tokens from a sliding window of {self.sliding_window}: it "
                "let go of tokens that the window would see again. Call "
                "cache.activate_past_recording() before the forward, as generate does"
            )
        super().crop(tokens_to_remove)
        for _ in range(count):
            self.newest.pop()
        self._trim()

    def reset(self) -> None:
        """Forget all tokens; the layer stays usable with a compressed model."""
        super().reset()
        self.attended, self.newest, self.lost = None, deque(), 0
