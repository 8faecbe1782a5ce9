"""Copy what a forward gave out of memory that the next replay writes on.

Results, KV caches and records are trees of small objects with tensors in them. A copy has its own
tensors, one for each that was shared, and shares all that follows from the layout.
"""

from collections.abc import Callable
from functools import cache, partial
from types import MethodType
from typing import Any, Final

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer
from transformers.utils import ModelOutput

from vispress.methods.cached_selector import Selection
from vispress.runtime.forward.prefill_record import Alive, PrefillRecord
from vispress.runtime.graphs.lengths import without
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
        behind: Rows behind a lengthened prompt, which are left out.
    """

    def __init__(self, device: torch.device, behind: int = 0) -> None:
        self._device, self._behind = device.type, behind
        self._made: dict[int, tuple[Any, Any]] = {}

    def of(self, value: Any) -> Any:
        """Copy a value and all that it holds."""
        make = _maker(type(value))  # type: ignore[arg-type]
        if make is None:
            return value
        known = self._made.get(id(value))
        if known is not None:
            return known[1]
        made = make(self, value)
        self._made[id(value)] = value, made  # held, so that its id stays its own
        return made

    def stands_for(self, value: Any, other: Any) -> None:
        """Let a value be copied as another one that is there."""
        self._made[id(value)] = value, other

    def tensor(self, value: Tensor) -> Tensor:
        """Copy a tensor."""
        return value.clone() if value.device.type == self._device else value

    def output(self, value: ModelOutput) -> Any:
        """Copy what a forward gives."""
        return type(value)(**{name: self.of(one) for name, one in value.items()})

    def listed(self, value: Any) -> Any:
        """Copy a list or a tuple."""
        return type(value)(map(self.of, value))

    def bound(self, value: Any) -> Any:
        """Copy a function with arguments, or with an object, of its own."""
        if isinstance(value, MethodType):
            return MethodType(value.__func__, self.of(value.__self__))
        return partial(value.func, *map(self.of, value.args), **self.named(value.keywords))

    def named(self, values: dict[Any, Any]) -> dict[Any, Any]:
        """Copy a dictionary."""
        return {self.of(name): self.of(one) for name, one in values.items()}

    def twin(self, value: Any) -> Any:
        """Copy an object and its fields."""
        twin = object.__new__(type(value))
        self._made[id(value)] = value, twin
        fields = without(value, self._behind) if self._behind else vars(value)
        twin.__dict__.update({name: self.of(one) for name, one in fields.items()})
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


@cache
def _maker(kind: type) -> Callable[[Copies, Any], Any] | None:
    """What copies values of a kind; None where they are shared."""
    exact: dict[type, Callable[[Copies, Any], Any]] = {
        dict: Copies.named,
        list: Copies.listed,
        tuple: Copies.listed,
    }
    kinds: list[tuple[Any, Callable[[Copies, Any], Any]]] = [
        (Tensor, Copies.tensor),
        (ModelOutput, Copies.output),
        (Cache, Copies.cache),
        (_COPIED, Copies.twin),
        ((partial, MethodType), Copies.bound),
    ]
    found = (make for parents, make in kinds if issubclass(kind, parents))
    return exact.get(kind) or next(found, None)
