"""Choose among cached visual tokens, in one call that brings text alone (`stages.decode`)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache

from vispress.errors import UnsupportedModelError
from vispress.methods.base import Compressor
from vispress.methods.cached_selector import CachedSelector, Selection
from vispress.runtime.hooks.attention import Softmax, attention_rows
from vispress.runtime.kv_cache.slots import CompressedLayerMixin
from vispress.runtime.plan.plan import Plan
from vispress.runtime.stages.base import Prepared, StageCall, StepCall, Watched
from vispress.runtime.tokens import masks


class Chooser(Protocol):
    """A placement in decoding."""

    @property
    def method(self) -> Compressor:
        """The compressor."""

    @property
    def selector(self) -> CachedSelector:
        """What it chooses."""

    @property
    def reads(self) -> int:
        """Decoder layer whose attention is read."""


class Decoding:
    """The choice in one call that brings text alone.

    Args:
        step: The placement.
        cache: Its layer that is read holds a selection.
        implementation: Attention implementation.
        valid: `[B, Q]` bool, the call's tokens that are no padding; None for all.
    """

    def __init__(
        self, step: Chooser, cache: Cache, implementation: str | None, valid: Tensor | None
    ) -> None:
        self.step, self.cache, self.valid = step, cache, valid
        self.kind = masks.check_implementation(implementation)
        self.hidden: Tensor | None = None  # [B, Q, V] bool, what deeper layers do not see
        self._masks: dict[tuple[int, int], tuple[Any, ...]] = {}
        self.plan: Plan | None = None
        self.prepared: Prepared | None = None

    @classmethod
    def of(
        cls,
        step: Chooser,
        cache: Cache | None,
        implementation: str | None,
        valid: Tensor | None = None,
    ) -> StageCall | None:
        """The part of the stage in a call; None where there is nothing to choose from."""
        call = cls._begun(step, cache, implementation, valid)
        if call is None:
            return None
        return StageCall(layer_kwargs=call.layer_kwargs, attend=call.attend)

    @classmethod
    def of_step(
        cls, step: Chooser, plan: Plan, cache: Cache, prepared: Prepared
    ) -> StepCall | None:
        """The part of the stage in a prepared step; likewise."""
        call = cls._begun(step, cache, plan.implementation)
        if call is None:
            return None
        call.plan, call.prepared = plan, prepared
        return StepCall(range(step.reads, step.reads + 1), call.attend_step)

    @classmethod
    def _begun(
        cls,
        step: Chooser,
        cache: Cache | None,
        implementation: str | None,
        valid: Tensor | None = None,
    ) -> "Decoding | None":
        if cache is None or len(cache.layers) <= step.reads:
            return None
        held = cache.layers[step.reads]
        if not isinstance(held, CompressedLayerMixin) or held.selection is None:
            return None
        return cls(step, cache, implementation, valid)

    def layer_kwargs(self, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Hide from deeper layers what was not chosen."""
        if number < self.step.reads:
            return kwargs
        held = self.cache.layers[number]
        assert isinstance(held, CompressedLayerMixin)
        if number == self.step.reads:
            if self.kind == "flash" and hidden.shape[1] > 1:
                raise UnsupportedModelError(
                    f"{self.step.method.name} chooses anew at each of the {hidden.shape[1]} tokens "
                    "that are fed at once, and FlashAttention has one mask for all; use 'sdpa', "
                    "feed them one by one, or compress with dynamic=False"
                )
            return kwargs
        mask = kwargs.get("attention_mask")
        return kwargs | {"attention_mask": self._narrowed(held.coming(), mask, hidden)}

    def attend(self, number: int, watched: Watched) -> Tensor | None:
        """Choose, by what the attention of the layer that is read is called with."""
        if number == self.step.reads:
            with torch.no_grad():  # no decorator: a graph would break at it
                self._choose(watched)
        return watched.mask

    def attend_step(
        self,
        number: int,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        kwargs: Mapping[str, Any],
    ) -> Tensor | None:
        """Choose likewise in a prepared step, and let deeper layers find their masks."""
        assert self.plan is not None
        assert self.prepared is not None
        shards, by_layer = self.plan.shards(query.shape[1]), self.prepared.by_layer
        self._choose(Watched(query, key, key, mask, Softmax.of(kwargs), shards))
        assert by_layer is not None
        before: dict[str, Any] | None = None
        narrowed: dict[str, Any] = {}
        for layer in range(number + 1, len(by_layer)):
            if by_layer[layer] is not before:  # layers that hold the same share one
                before, held = by_layer[layer], self.cache.layers[layer]
                assert isinstance(held, CompressedLayerMixin)
                places = held.coming()
                given = before.get("attention_mask")
                fresh = self._narrow(places, given, places.device, query.dtype)
                narrowed = before | {"attention_mask": fresh}
            by_layer[layer] = narrowed
        return mask

    def _choose(self, watched: Watched) -> None:
        query, key, _, mask, softmax, shards = watched
        held = self.cache.layers[self.step.reads]
        assert isinstance(held, CompressedLayerMixin)
        state = held.selection
        assert state is not None
        positions, valid = held.stored()
        S, V = key.shape[2], state.visual.shape[1]
        if mask is not None:
            mask = mask[:, None, None, :S].bool() if mask.ndim == 2 else mask[..., :S]
        rows = attention_rows(query, key, mask, softmax).mean(dim=1)  # [B, Q, S]
        rows = rows if shards is None else shards.mean(rows)
        places = positions if valid is None else positions + (~valid).long() * V
        places = _padded(places, S, V)  # text behind the last prefill goes to a spare column
        index = places[:, None].expand(-1, rows.shape[1], -1)
        spread = rows.new_zeros(*rows.shape[:2], V + 1).scatter(2, index, rows)[..., :V]
        spread = spread * state.visual[:, None]
        states = [state]
        for number in range(spread.shape[1]):
            states.append(self._next(states[-1], spread[:, number], number))
        self.hidden = torch.stack([one.visual & ~one.selected for one in states[1:]], dim=1)
        held.selected(states)

    def _next(self, state: Selection, attention: Tensor, number: int) -> Selection:
        """The state behind one token; padding changes nothing."""
        selected = self.step.selector.select_cached(attention, state)
        begun = torch.ones_like(state.begun)
        if self.valid is not None:
            real = self.valid[:, number].to(begun.device)
            begun = state.begun | real
            selected = torch.where(real[:, None], selected, state.selected)
            attention = torch.where(real[:, None], attention, state.attention)
        return replace(state, attention=attention, selected=selected, begun=begun)

    def _narrowed(self, positions: Tensor, mask: Tensor | None, hidden: Tensor) -> Tensor:
        like = hidden.device, hidden.dtype
        if torch.compiler.is_compiling():
            return self._narrow(positions, mask, *like)
        key = (id(positions), id(mask))
        if key not in self._masks:  # what has the ids is kept with it
            self._masks[key] = (self._narrow(positions, mask, *like), positions, mask)
        narrowed: Tensor = self._masks[key][0]
        return narrowed

    def _narrow(
        self, positions: Tensor, mask: Tensor | None, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """The mask without what is hidden; slots behind those in use are masked as they were."""
        assert self.hidden is not None
        V = self.hidden.shape[2]
        S = positions.shape[1] if mask is None else mask.shape[-1]
        places = _padded(positions.to(device), S, V)
        index = places[:, None].expand(-1, self.hidden.shape[1], -1)
        seen = ~F.pad(self.hidden.to(device), (0, 1)).gather(2, index)  # [B, Q, S]
        if self.kind == "flash":
            return seen[:, 0] if mask is None else mask.bool() & seen[:, 0]
        if mask is None:
            return masks.as_kind(seen, self.kind, dtype)
        if mask.dtype == torch.bool:
            return mask & seen[:, None]
        return mask.masked_fill(~seen[:, None], torch.finfo(mask.dtype).min)


def _padded(positions: Tensor, size: int, last: int) -> Tensor:
    """`[B, size]`: positions, none behind `last`, and `last` for slots behind those in use."""
    if spare := size - positions.shape[1]:  # a fill value would be a constant of a compiled graph
        positions = F.pad(positions, (0, spare), value=last)
    return positions.clamp(max=last)
