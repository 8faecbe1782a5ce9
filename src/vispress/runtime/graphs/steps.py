"""Record a decode step on buffers of its own, and run it for conversations that fit into them."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticCache, StaticLayer

from vispress.runtime.graphs.arguments import MASK, POSITIONS
from vispress.runtime.graphs.backends import record
from vispress.runtime.graphs.copies import Copies
from vispress.runtime.graphs.lodging import Lodging
from vispress.runtime.graphs.site import Site
from vispress.runtime.graphs.watch import Watch
from vispress.runtime.kv_cache.hf_compat import CACHE, OLD
from vispress.runtime.kv_cache.slots import CompressedLayerMixin, Slots
from vispress.runtime.kv_cache.static import CompressedStaticLayer
from vispress.runtime.tokens import masks

_ROUND: Final = 64
"""Slots of a short layer are rounded up to a multiple of this."""


@dataclass(frozen=True)
class Room:
    """What a layer of a graph's cache must be like.

    Args:
        short: Whether it holds less than all tokens.
        capacity: Slots.
        heads: Of keys and values.
        widths: Of a key and of a value.
        dtype: Of both.
        shifted: Whether later position ids are smaller.
    """

    short: bool
    capacity: int
    heads: int
    widths: tuple[int, int]
    dtype: torch.dtype
    shifted: bool


@dataclass(frozen=True)
class Guest:
    """What a conversation's cache needs: known on the host.

    Args:
        rooms: One a layer.
        used: Slots in use of each layer.
        length: Logical tokens.
        capacity: Logical tokens that fit.
    """

    rooms: tuple[Room, ...]
    used: tuple[int, ...]
    length: int
    capacity: int

    @classmethod
    def of(cls, cache: Cache, bucket: int) -> "Guest":
        """Measure a cache; of a static one, lengths are waited for, once a conversation."""
        layers: Sequence[Any] = cache.layers
        if isinstance(layers[0], StaticLayer):
            told = [layer.cumulative_length.reshape(()) for layer in layers]
            told.append(layers[0].get_seq_length().reshape(()))
            *used, length = torch.stack(told).tolist()
            capacity = int(layers[0].get_max_length())
            sizes = [int(layer.max_cache_len) for layer in layers]
        else:
            used = [layer.keys.shape[2] for layer in layers]
            length = int(layers[0].get_seq_length())
            capacity = -(-(length + 1) // bucket) * bucket
            sizes = [
                -(-(held + capacity - length) // _ROUND) * _ROUND if _short(layer) else capacity
                for held, layer in zip(used, layers, strict=True)
            ]
        rooms = tuple(_room(layer, size) for layer, size in zip(layers, sizes, strict=True))
        return cls(rooms, tuple(used), length, capacity)

    def why_not(self, step: "Step", cache: Cache, implementation: str | None) -> str | None:
        """Say why a step on this cache cannot be recorded; it then says itself what is wrong."""
        layers: Sequence[Any] = cache.layers
        mask, width = step.mask, self.capacity
        if masks.check_implementation(implementation) == "flash":
            return "FlashAttention has no static KV cache"
        if self.length >= self.capacity:
            return "its KV cache is full"
        if len({len(layer.keys) for layer in layers} | {len(step.tensors["input_ids"])}) > 1:
            return "its KV cache is of another batch"
        if mask is not None:
            width = mask.shape[-1]
            if mask.ndim == 4 and not isinstance(layers[0], StaticLayer):
                return "a 4-D mask is given on a growing KV cache"
        if not self.length < width <= self.capacity:
            return f"its mask has {width} columns for {self.length + 1} tokens"
        padded = any(_short(layer) and layer.padded for layer in layers)
        if padded and (mask is None or (mask.ndim == 2 and bool(mask[:, : self.length].all()))):
            return "its mask shows padding"
        return None


def _short(layer: Any) -> bool:
    return isinstance(layer, CompressedLayerMixin)


def _room(layer: Any, capacity: int) -> Room:
    shifted = _short(layer) and layer.last_stored.shift is not None
    widths = layer.keys.shape[-1], layer.values.shape[-1]
    heads, dtype = layer.keys.shape[1], layer.keys.dtype
    return Room(_short(layer), capacity, heads, widths, dtype, shifted)


@dataclass(frozen=True, eq=False)
class Step:
    """Keyword arguments of a forward of one token, sorted.

    Args:
        tensors: By name, without the mask.
        mask: `[B, L]`, or 4-D over logical positions; None for all tokens.
        plain: What is no tensor, by name.
    """

    tensors: Mapping[str, Tensor]
    mask: Tensor | None
    plain: Mapping[str, Any]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "Step":
        """Sort them."""
        rest = {name: one for name, one in given.items() if name not in (MASK, CACHE, OLD)}
        tensors = {name: one for name, one in rest.items() if isinstance(one, Tensor)}
        plain = {name: one for name, one in rest.items() if not isinstance(one, Tensor)}
        return cls(tensors, given.get(MASK), plain)

    def key(self) -> Hashable:
        """Give what steps of one graph share."""
        mask = self.mask
        return (
            tuple((name, one.shape, one.dtype) for name, one in self.tensors.items()),
            None if mask is None else 2 if mask.ndim == 2 else (mask.shape, mask.dtype),
            tuple(self.plain.items()),
        )


class StepGraph:
    """A recorded step.

    Args:
        site: The model.
        step: Arguments of one call.
        guest: What its cache needs.
        lock: What the owner holds while it runs.
        key: What it is found by.

    Raises:
        NotFixedError: It is no fixed sequence of operations.
    """

    def __init__(
        self, site: Site, step: Step, guest: Guest, lock: Any, key: tuple[Hashable, ...]
    ) -> None:
        self._site, self._lock, self.capacity, self.key = site, lock, guest.capacity, key
        self._lodging: Lodging | None = None
        batch, device = len(step.tensors["input_ids"]), site.device
        with torch.inference_mode(False):
            self._inputs = {name: one.clone() for name, one in step.tensors.items()}
            if POSITIONS not in self._inputs:
                self._inputs[POSITIONS] = torch.zeros(1, 1, dtype=torch.long, device=device)
            whole = step.mask is None or step.mask.ndim == 2
            size = batch, guest.capacity
            self._mask = torch.ones(size, dtype=torch.bool, device=device)
            if not whole:
                assert step.mask is not None
                self._mask = step.mask.clone()
            self._room = _make_room(site, guest, batch)
        # whatever differs from step to step, and from one conversation to the next
        values = [*site.weights, *self._inputs.values(), self._mask, *_buffers(self._room)]

        def run() -> Any:
            mask = self._allowed() if whole else self._mask
            return site.original(**self._inputs, **{MASK: mask, CACHE: self._room}, **step.plain)

        self._recorded, self._result, self._keeps = record(
            site.backend, run, lambda answers: Watch(values, answers=answers), self._empty
        )

    def _allowed(self) -> Tensor:
        """The mask of one token, as transformers makes it for a static cache."""
        length = self._room.layers[0].get_seq_length()
        places = torch.arange(self._mask.shape[1], device=self._mask.device)
        allow = (self._mask & (places <= length))[:, None]
        config: Any = self._site.adapter.language_model.config
        kind = masks.check_implementation(config._attn_implementation)
        words: Any = self._site.adapter.base.get_input_embeddings()
        return masks.as_kind(allow, kind, words.weight.dtype)

    def _empty(self) -> None:
        """Let the buffers hold nothing."""
        for layer in self._room.layers:
            layer.cumulative_length.zero_()
            if isinstance(layer, CompressedStaticLayer):
                layer.slot_valid.zero_()
                layer.logical_length.zero_()

    def replay(self, step: Step, cache: Cache, guest: Guest | None) -> Any:
        """Take a step.

        Args:
            step: Its arguments.
            cache: The conversation's.
            guest: What it needs; None where it lives here already.

        Returns:
            What the forward gives.
        """
        if guest is not None:
            self.close()
            held = guest.used, guest.length, self._lock, self._site.backend.turn
            self._lodging = Lodging(cache, self, self._room, *held)
        lodging = self._lodging
        assert lodging is not None
        for name, tensor in step.tensors.items():
            self._inputs[name].copy_(tensor)
        if POSITIONS not in step.tensors:
            self._inputs[POSITIONS].fill_(lodging.length)
        if step.mask is not None:
            width = step.mask.shape[1] if step.mask.ndim == 2 else None
            (self._mask if width is None else self._mask[:, :width]).copy_(step.mask)
        self._recorded.replay()
        lodging.steps += 1
        copies = Copies(self._site.device)
        copies.stands_for(self._room, cache)
        return copies.of(self._result)

    def close(self) -> None:
        """Let the cache that lives here move out."""
        if self._lodging is not None and self._lodging.lives():
            self._lodging.leave()
        self._lodging = None


def _make_room(site: Site, guest: Guest, batch: int) -> Cache:
    """Allocate a cache for guests of one kind."""
    config = site.adapter.language_model.config
    cache = StaticCache(config=config, max_cache_len=guest.capacity)
    device = site.device
    layers: list[Any] = []
    for room in guest.rooms:
        layer: Any = StaticLayer(max_cache_len=guest.capacity)
        empty = torch.zeros(batch, 0, dtype=torch.long, device=device)
        shift = torch.zeros(batch, dtype=torch.long, device=device)
        slots = Slots(empty, None, shift if room.shifted else None, 0)
        if room.short:
            layer = CompressedStaticLayer.upgrade(layer, slots)
        layer.max_cache_len = room.capacity
        key, value = (
            torch.empty(batch, room.heads, 0, width, dtype=room.dtype, device=device)
            for width in room.widths
        )
        layer.lazy_initialization(key, value)
        if room.short:
            layer._allocate(slots)
        layers.append(layer)
    cache.layers = layers
    return cache


def _buffers(cache: Cache) -> list[Tensor]:
    """All tensors of a graph's cache."""
    found = [one for layer in cache.layers for one in vars(layer).values()]
    found += [layer._slots.shift for layer in cache.layers if hasattr(layer, "_slots")]
    return [one for one in found if isinstance(one, Tensor)]
