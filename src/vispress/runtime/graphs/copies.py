"""Copy what a forward gave out of memory that the next replay writes on.

Results, KV caches and records are trees of small objects with tensors in them. A copy has its own
tensors, one for each that was shared, and shares all that follows from the layout.
"""

from functools import partial
from types import MethodType
from typing import Any, Final

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer
from transformers.utils import ModelOutput

from vispress.methods.cached_selector import Selection
from vispress.runtime.forward.prefill_record import Alive, PrefillRecord
from vispress.runtime.kv_cache.pair_memory import PairMemory, PairSlots
from vispress.runtime.kv_cache.slots import Slots
from vispress.runtime.tokens.images import Image, Trace
from vispress.runtime.tokens.live_tokens import LiveTokens
from vispress.runtime.tokens.pair_masks import PairMasks

_COPIED: Final = (
    Alive,
    CacheLayerMixin,
    Image,
    LiveTokens,
    PairMasks,
    PairMemory,
    PairSlots,
    PrefillRecord,
    Selection,
    Slots,
    Trace,
)
"""Objects that hold tensors of a call; others belong to the layout, the plan or the model."""


class Copies:
    """One set of copies: what stands in several places is copied once.

    Args:
        device: Where memory is written again; tensors elsewhere are shared.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device.type
        self._made: dict[int, tuple[Any, Any]] = {}

    def of(self, value: Any) -> Any:
        """Copy a value and all that it holds."""
        known = self._made.get(id(value))
        if known is not None:
            return known[1]
        made = self._copy(value)
        self._made[id(value)] = value, made  # held, so that its id stays its own
        return made

    def stands_for(self, value: Any, other: Any) -> None:
        """Let a value be copied as another one that is there."""
        self._made[id(value)] = value, other

    def _copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.clone() if value.device.type == self._device else value
        if isinstance(value, ModelOutput):
            return type(value)(**{name: self.of(one) for name, one in value.items()})
        if isinstance(value, Cache):
            return self.cache(value)
        if isinstance(value, _COPIED):
            return self._twin(value)
        if isinstance(value, partial):
            return partial(value.func, *map(self.of, value.args), **self._named(value.keywords))
        if isinstance(value, MethodType):
            return MethodType(value.__func__, self.of(value.__self__))
        if isinstance(value, list | tuple) and type(value) in (list, tuple):
            return type(value)(map(self.of, value))
        if type(value) is dict:
            return self._named(value)
        return value

    def _named(self, values: dict[Any, Any]) -> dict[Any, Any]:
        return {self.of(name): self.of(one) for name, one in values.items()}

    def _twin(self, value: Any) -> Any:
        twin = object.__new__(type(value))
        self._made[id(value)] = value, twin
        twin.__dict__.update({name: self.of(one) for name, one in vars(value).items()})
        if isinstance(value, StaticLayer) and value.is_initialized:
            for tensor in (twin.keys, twin.values, twin.cumulative_length):
                torch._dynamo.mark_static_address(tensor)
        return twin

    def cache(self, held: Cache, into: Cache | None = None) -> Cache:
        """Copy a KV cache.

        Args:
            held: The cache.
            into: One of its kind that takes the layers; None for a new one.
        """
        made = object.__new__(type(held)) if into is None else into
        self._made[id(held)] = held, made
        layers = [self.of(layer) for layer in held.layers]
        made.__dict__.update(vars(made) | vars(held) | {"layers": layers})
        return made
