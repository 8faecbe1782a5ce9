"""Let a conversation's KV cache live in the buffers of a recorded step, as long as it takes steps.

A graph writes where it was recorded, so a cache moves in: its tensors are copied into the graph's,
and its layers, which stay in the cache object, stand for them. Whoever reads a layer's tensors
(beams, crops, another turn, a copy) makes the whole cache move out first, and finds it as it would
be.
"""

import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from vispress.runtime.kv_cache.dynamic import CompressedDynamicLayer, ForgettingLayer
from vispress.runtime.kv_cache.slots import CompressedLayerMixin, Slots
from vispress.runtime.kv_cache.static import CompressedStaticLayer

LODGEABLE: Final = (
    DynamicLayer,
    ForgettingLayer,
    CompressedDynamicLayer,
    StaticLayer,
    CompressedStaticLayer,
)
"""Kinds of layers that can move, exactly."""
_BUFFERS: Final = ("keys", "values", "cumulative_length")
_OWN: Final = ("slot_positions", "slot_valid", "logical_length")
_MOVED: Final = (*_BUFFERS, *_OWN, "slots")
_RESTLESS: Final = "_vispress_restless"
"""Attribute of a cache: how often it moved out behind a single step."""
_AT_MOST: Final = 3


class Lodging:
    """A cache in the buffers of a recorded step.

    Args:
        cache: The conversation's.
        home: The recorded step.
        room: Its own cache.
        used: Slots in use of each layer, as the cache moves in.
        length: Logical tokens, likewise.
        lock: What the owner of the graph holds while it runs.
        turn: What a thread does in whose turn it is to use the buffers.
    """

    def __init__(
        self,
        cache: Cache,
        home: Any,
        room: Cache,
        used: Sequence[int],
        length: int,
        lock: Any,
        turn: Callable[[], Any],
    ) -> None:
        self.home, self._turn = home, turn
        self._cache, self._room, self._used = weakref.ref(cache), room, tuple(used)
        self._start, self.steps, self._lock = length, 0, lock
        self._layers = [weakref.ref(layer) for layer in cache.layers]
        self._held: list[dict[str, Any]] = []
        for layer, own, count in zip(cache.layers, room.layers, used, strict=True):
            _fill(own, layer, count, length)
        for layer in cache.layers:
            kept = {name: vars(layer).pop(name) for name in _MOVED if name in vars(layer)}
            if not isinstance(layer, StaticLayer):
                kept = {name: one for name, one in kept.items() if name == "slots"}
            self._held.append(kept)
            layer.__dict__["_lodging"] = self
            layer.__class__ = _lodged(type(layer))  # type: ignore[arg-type]

    @property
    def length(self) -> int:
        """Logical tokens of the conversation by now."""
        return self._start + self.steps

    def lives(self) -> bool:
        """Whether the conversation's cache is still there."""
        return self._cache() is not None

    def takes(self, mask: Tensor | None) -> bool:
        """Whether there is room for a token more, and a mask is one for it."""
        capacity: int = self.home.capacity
        width = capacity if mask is None or mask.ndim != 2 else mask.shape[1]
        return self.length < width <= capacity

    def at_home(self, layer: Any) -> Any:
        """Give the graph's layer that a layer of the cache stands for."""
        place = next(i for i, one in enumerate(self._layers) if one() is layer)
        return self._room.layers[place]

    def leave(self) -> None:
        """Give all that the graph's buffers hold back to the cache's layers."""
        with self._lock, torch.no_grad(), self._turn():
            if (cache := self._cache()) is not None and self.steps < 2:
                setattr(cache, _RESTLESS, getattr(cache, _RESTLESS, 0) + 1)
            slots: dict[int, Slots] = {}
            rows = zip(self._layers, self._room.layers, self._held, self._used, strict=True)
            for seen, own, kept, used in rows:
                layer = seen()
                if layer is not None and vars(layer).get("_lodging") is self:
                    layer.__class__ = type(layer).kind
                    del layer.__dict__["_lodging"]
                    self._give_back(layer, own, kept, used + self.steps, slots)

    def _give_back(
        self, layer: Any, own: Any, kept: dict[str, Any], used: int, slots: dict[int, Slots]
    ) -> None:
        if isinstance(layer, StaticLayer):
            for name, tensor in kept.items():
                tensor.copy_(getattr(own, name))
            layer.__dict__.update(kept)
            return
        layer.keys = own.keys[:, :, :used].clone()
        layer.values = own.values[:, :, :used].clone()
        if (before := kept.get("slots")) is not None:
            if id(before) not in slots:  # layers that hold the same share one
                slots[id(before)] = before.with_steps(self.steps)
            layer.slots = slots[id(before)]


def _fill(own: Any, layer: Any, used: int, length: int) -> None:
    """Copy a layer's tokens into a graph's layer."""
    for into, held in ((own.keys, layer.keys), (own.values, layer.values)):
        into[:, :, :used].copy_(held[:, :, :used])
        into[:, :, used:].zero_()  # what another conversation left may not be a number
    own.cumulative_length.fill_(used)
    if not isinstance(own, CompressedStaticLayer):
        return
    if isinstance(layer, CompressedStaticLayer):
        own.slot_positions.copy_(layer.slot_positions)
        own.slot_valid.copy_(layer.slot_valid)
    else:
        held = layer.slots
        own.slot_positions[:, :used] = held.positions
        own.slot_valid.zero_()
        own.slot_valid[:, :used] = (
            torch.ones_like(held.positions, dtype=torch.bool) if held.valid is None else held.valid
        )
    own.logical_length.fill_(length)
    if (shift := _slots_of(layer).shift) is not None:
        assert own._slots.shift is not None
        own._slots.shift.copy_(shift)


def _slots_of(layer: CompressedLayerMixin) -> Slots:
    return layer.last_stored


def lodging_of(cache: Any) -> Lodging | None:
    """Find where a cache lives; None for at home."""
    layers = getattr(cache, "layers", ())
    return vars(layers[0]).get("_lodging") if layers else None


def why_no_lodging(cache: Any) -> str | None:
    """Say why a cache cannot move into a graph."""
    layers = getattr(cache, "layers", ())
    if lodging_of(cache) is not None:
        return None
    kinds = {type(layer) for layer in layers}
    if not layers or not kinds <= set(LODGEABLE) or getattr(cache, "offloading", False):
        return f"its KV cache is a {type(cache).__name__} of other layers than a graph has"
    if not all(layer.is_initialized for layer in layers):
        return "its KV cache is empty"
    for layer in layers:
        own = isinstance(layer, CompressedLayerMixin)
        if own and (layer.selection is not None or layer.pairs is not None):
            return "its KV cache remembers more than tokens"
    if getattr(cache, _RESTLESS, 0) >= _AT_MOST:
        return "its KV cache moves between steps (beams, drafts, conversations in turns)"
    return None


def _get_seq_length(self: Any) -> Any:
    """Logical length: for a static layer a tensor, as from there."""
    lodging: Lodging = vars(self)["_lodging"]
    if isinstance(self, StaticLayer):
        return lodging.at_home(self).get_seq_length()
    return lodging.length


def _get_mask_sizes(self: Any, query_length: int) -> Any:
    """As the layer's own, which waits for nothing."""
    if isinstance(self, StaticLayer):
        return type(self).kind.get_mask_sizes(self, query_length)
    return self.get_seq_length() + int(query_length), 0


def _reduce_ex(self: Any, protocol: Any) -> Any:
    """Copies are those of a layer that is at home."""
    vars(self)["_lodging"].leave()
    return self.__reduce_ex__(protocol)


@cache
def _lodged(kind: type) -> Any:
    """The class of layers of a kind whose tensors are a graph's.

    It has one parent and adds no field: so a layer can be made one, and be made its own again.
    """
    own: dict[str, Any] = {name: property(*_moving(name)) for name in _MOVED}
    own |= {"kind": kind, "get_seq_length": _get_seq_length, "get_mask_sizes": _get_mask_sizes}
    return type(f"Lodged{kind.__name__}", (kind,), own | {"__reduce_ex__": _reduce_ex})


def _moving(name: str) -> tuple[Any, Any]:
    def read(self: Any) -> Any:
        vars(self)["_lodging"].leave()
        return getattr(self, name)

    def write(self: Any, value: Tensor) -> None:
        vars(self)["_lodging"].leave()
        setattr(self, name, value)

    return read, write
