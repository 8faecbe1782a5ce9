"""Run a decode step on a growing cache: what layers need is made once, for all that hold the same.

A step is the most frequent call there is, so it costs next to nothing here: its masks and tables
are transformers' own wherever a short layer needs no others, and layers find theirs in a list.
A method that chooses at each step is shown the attention that it reads, and changes what layers
find. Whatever is not plain (a chunk, windows, attention maps) goes the general way through
`prefill`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from vispress.runtime.forward.model_call import ModelCall
from vispress.runtime.forward.owner import amid_turn
from vispress.runtime.hooks.attention import OBSERVER
from vispress.runtime.kv_cache.cache_layers import refuse_shown_padding
from vispress.runtime.kv_cache.dynamic import CompressedDynamicLayer, ForgettingLayer
from vispress.runtime.kv_cache.hf_compat import cache_of
from vispress.runtime.kv_cache.slots import Slots
from vispress.runtime.plan.plan import Plan
from vispress.runtime.stages.base import RuntimeStage, StepAttend
from vispress.runtime.tokens import masks

_GROWING: Final = {DynamicLayer, ForgettingLayer, CompressedDynamicLayer}
_PLAIN: Final = -1
"""Group of layers that hold all tokens."""
_OFFSETS: Final = "_vispress_offsets"
"""Attribute of a cache: shifts of its groups, and a tensor of them."""


def decode_step(
    plan: Plan,
    stages: Sequence[RuntimeStage],
    call: ModelCall | None,
    module: Any,
    kwargs: Mapping[str, Any],
) -> dict[str, Any] | None:
    """Recognise a call of one token on a growing cache that was compressed.

    Args:
        plan: What is asked of the model.
        stages: The stages of its chain.
        call: What the base model was called with, if it was.
        module: The language model.
        kwargs: Its keyword arguments; embeddings of one token among them.

    Returns:
        Keyword arguments of the language model that differ; None for other calls.

    Raises:
        CompressionStateError: Another plan's methods remember in the cache.
    """
    cache = cache_of(kwargs)
    kinds = {type(held) for held in getattr(cache, "layers", ())}
    if CompressedDynamicLayer not in kinds or not kinds <= _GROWING:
        return None
    assert cache is not None
    if (
        not plan.uniform
        or module.training
        or (call is not None and (call.captures or call.chunks is not None))
        or not amid_turn(plan.adapter.base)
    ):
        return None
    maps = kwargs.get("output_attentions")
    if module.config.output_attentions if maps is None else maps:
        return None
    ids, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    past = _length(cache.layers[0])
    if len(cache.layers) != plan.num_layers or _length(cache.layers[-1]) != past:
        return None  # an interrupted forward's is refused where all calls are
    for told in (mask, None if call is None else call.arguments.get("attention_mask")):
        if told is not None and (not isinstance(told, Tensor) or told.shape[-1] != past + 1):
            return None  # too short a mask is refused where all calls are
    plan.remembering.check(cache)
    step = DynamicDecodeCall(plan, cache, ids)
    if plan.remembering.methods and not step.open(stages):
        return None
    if step.shifts and (ids is None or ids.ndim != 2 or not plan.fixed_rotary):
        return None
    step.given_whole = mask is not None and mask.ndim > 2
    step.expect(cache)
    return {OBSERVER: step, **step.model_kwargs(cache)}


def _length(held: Any) -> int:
    """Logical length of a growing layer, for as few calls as can be."""
    if type(held) is CompressedDynamicLayer:
        return held.slots.logical
    return held.keys.shape[-2] if held.is_initialized else -1


class DynamicDecodeCall:
    """What the layers need for one token; in place of a `Running`.

    Args:
        plan: What is asked of the model.
        cache: Its compressed layers are told of the token.
        position_ids: `[B or 1, 1]`; None where no layer needs them.
    """

    attention: Final = None
    """No stage computes the attention of a decode step."""

    def __init__(self, plan: Plan, cache: Cache, position_ids: Tensor | None) -> None:
        self.plan, self.position_ids, self._cache = plan, position_ids, cache
        self.watched = range(0)
        """Layers whose attention a stage is shown."""
        self.shown: StepAttend | None = None
        """Is shown it."""
        self.functions: dict[str, Any] = {}
        """Attention functions that were looked up in the step, by implementation."""
        self.slots: list[Slots] = []
        """What compressed layers hold behind the step, each once."""
        self._group = [_PLAIN] * len(cache.layers)
        before, group = None, _PLAIN
        for number, held in enumerate(cache.layers):
            if type(held) is CompressedDynamicLayer:
                if held.slots is not before:
                    before = held.slots
                    group += 1
                    self.slots += [before.with_step()]
                self._group[number] = group
        self.shifts = [slots.shift for slots in self.slots if slots.shift is not None]
        self.given_whole = False
        """Whether the mask of all layers is the user's own."""
        self.padded = bool([slots for slots in self.slots if slots.padded])
        """Whether the cache lacks tokens that a mask hid."""
        self.by_layer: list[dict[str, Any]] | None = None
        """What differs from the keyword arguments that transformers made, once it is known."""

    def open(self, stages: Sequence[RuntimeStage]) -> bool:
        """Open the stage that goes on while decoding; tells whether a prepared step can have it."""
        on = [stage for stage in stages if stage.remembers is not None]
        device = self.slots[0].positions.device.type
        if len(on) > 1 or torch.is_grad_enabled() or torch.is_autocast_enabled(device):
            return False
        for stage in on:
            if stage.open_step is None:
                return False
            opened = stage.open_step(self.plan, self._cache, self)
            if opened is not None:
                self.watched, self.shown = opened
        return True

    def to(self, *args: Any, **kwargs: Any) -> "DynamicDecodeCall":
        """Itself: accelerate's hooks move keyword arguments between devices."""
        return self

    def expect(self, cache: Cache) -> None:
        """Tell the compressed layers of the cache of the token."""
        for held, group in zip(cache.layers, self._group, strict=True):
            if group != _PLAIN:
                held.pending = self.slots[group]

    def make(self, kwargs: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Make what differs for each layer; those that hold the same share it.

        Args:
            kwargs: Keyword arguments of the first layer; all are of one kind.

        Raises:
            ConfigError: The mask shows padding that is not stored.
        """
        given = kwargs.get("attention_mask")
        kind = "" if given is None else masks.check_implementation(self.plan.implementation)
        if given is None:  # transformers leaves a mask out where all tokens are shown
            refuse_shown_padding(self.padded)
        elif self.padded and (self.given_whole or kind == "eager"):  # but for eager attention
            refuse_shown_padding(bool(masks.allowed(given).all()))
        tables = self._tables(kwargs["position_embeddings"])
        plain: dict[str, Any] = {}
        if self.shifts:
            plain = {"position_embeddings": tables[0], "position_ids": self.position_ids}
        changes, place = [plain] * (len(self.slots) + 1), 0  # the last is that of `_PLAIN`
        for number, slots in enumerate(self.slots):
            changed: dict[str, Any] = {"position_ids": None}  # as in every call of a short layer
            place += slots.shift is not None
            if self.shifts:
                changed["position_embeddings"] = tables[0 if slots.shift is None else place]
            if given is not None or not slots.all_valid:
                kind = kind or masks.check_implementation(self.plan.implementation)
                changed["attention_mask"] = _mask(given, slots, kind)
            changes[number] = changed
        self.by_layer = [changes[group] for group in self._group]
        if self.watched:  # their attention is handed the keyword
            watched = [changed | {OBSERVER: self} for changed in changes]
            for layer in self.watched:
                self.by_layer[layer] = watched[self._group[layer]]
        return self.by_layer

    def model_kwargs(self, cache: Cache) -> dict[str, Any]:
        """Give the keyword arguments of the language model that differ.

        Where placements close the gaps in position ids, the model makes tables for them together
        with its own: a step's are those of a sequence, of which each layer takes one place.
        """
        if not self.shifts:
            return {}
        known: Any = getattr(cache, _OFFSETS, ((), None))
        ids = self.position_ids
        assert ids is not None
        same = len(known[0]) == len(self.shifts)
        if not same or [1 for a, b in zip(known[0], self.shifts, strict=True) if a is not b]:
            shifts = [one.to(ids.device) for one in self.shifts]
            known = self.shifts, torch.stack([torch.zeros_like(shifts[0]), *shifts], dim=1)
            setattr(cache, _OFFSETS, known)
        return {"position_ids": (ids - known[1]).clamp(min=0)}

    def _tables(self, given: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Rotary tables of layers without a shift, then of each that is shifted."""
        if not self.shifts:
            return [given]
        cos, sin = given
        places = range(1 + len(self.shifts))
        return [(cos[:, at : at + 1], sin[:, at : at + 1]) for at in places]


def _mask(given: Tensor | None, slots: Slots, kind: str) -> Tensor | None:
    """Cut the mask of one token to a layer's slots.

    Args:
        given: `[B or 1, H or 1, 1, L]`, bool or additive; for FlashAttention `[B, L]`; or None.
        slots: The layer's, the token's among them.
        kind: As from `masks.check_implementation`.
    """
    valid, flat = slots.valid, kind == "flash"
    if valid is not None and not flat:
        valid = valid[:, None, None]
    if given is None:
        return valid
    positions = slots.positions
    given = given.to(positions.device)
    if flat:
        cut = given.bool().gather(1, positions)
    else:
        index = positions[:, None, None].expand(-1, given.shape[1], -1, -1)
        cut = given.expand(len(positions), -1, -1, -1).gather(3, index)
    if valid is None:
        return cut
    if cut.dtype == torch.bool:
        return cut & valid
    return cut.masked_fill(~valid, torch.finfo(cut.dtype).min)
