"""Choose among cached visual tokens while decoding: one layer is read, deeper ones see a part.

Every token that is fed behind a prefill is a step, however many a call brings: so several tokens at
once (assisted decoding, a further turn) give what they give one by one. A call with images is a
prefill: it sees the whole cache, and the next step is again the first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache

from vispress.adapters.base import ModelAdapter
from vispress.errors import ConfigError, UnsupportedModelError
from vispress.methods.base import Compressor
from vispress.methods.cached_selector import CachedSelector, Selection
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.hooks.attention import attention_rows
from vispress.runtime.kv_cache.slots import CompressedLayerMixin
from vispress.runtime.plan.bound import BoundPlacement
from vispress.runtime.plan.plan import Plan
from vispress.runtime.stages.base import Binding, RuntimeStage, StageCall, Watched
from vispress.runtime.tokens import masks
from vispress.runtime.tokens.images import Image
from vispress.types import Placement, Stage

CARRIES = frozenset({Stage.DECODE})


def bind(binding: Binding) -> RuntimeStage | None:
    """Make the stage of a chain with a method that chooses among cached tokens.

    Raises:
        ConfigError: A layer is out of range, two methods choose while decoding, or tokens bypass
            the layer that is read.
    """
    step = find_decode_step(binding.methods, binding.placements, binding.adapter)
    if step is None:
        return None
    binding.notes.append(
        f"{step.method.name}: while decoding with a KV cache, layers from {step.placement.layer} "
        f"see a part of the cached visual tokens, by the attention of layer {step.reads}"
    )
    return RuntimeStage(
        carries=CARRIES,
        open=step.open,
        open_static=step.open_static,
        order=50,
        watched_layers=frozenset({step.reads}),
        remembers=step.method,
    )


@dataclass(frozen=True, eq=False)
class DecodeStep:
    """A placement in decoding.

    Args:
        method: The compressor.
        selector: What it chooses there.
        placement: Its layer is the first that sees a part; the one before is read.
    """

    method: Compressor
    selector: CachedSelector
    placement: Placement

    @property
    def reads(self) -> int:
        """Decoder layer whose attention is read."""
        return self.placement.layer - 1

    def covers(self, image: Image) -> bool:
        """Whether the tokens of an image or video are chosen from."""
        return self.method.needs != "video" or image.modality == "video"

    def open(self, state: ForwardState) -> StageCall | None:
        """Begin a prefill that leaves something to choose from, or a step that chooses."""
        if not state.images:
            return Decoding.of(self, state.cache, state.plan.implementation, state.chunk_valid)
        if state.cache is None:
            return None
        covered = any(map(self.covers, state.images))
        return StageCall(
            own_from=self.reads if covered else None, layer_kwargs=partial(_note, self, state)
        )

    def open_static(self, plan: Plan, cache: Cache) -> StageCall | None:
        """Begin a decode step on a static cache."""
        return Decoding.of(self, cache, plan.implementation)


def find_decode_step(
    methods: Sequence[Compressor], steps: Sequence[BoundPlacement], adapter: ModelAdapter
) -> DecodeStep | None:
    """The placement in decoding of a chain of methods.

    Raises:
        ConfigError: A layer is out of range, two methods choose while decoding, or tokens bypass
            the layer that is read.
    """
    found: DecodeStep | None = None
    for method in methods:
        selector = method.cached_selector()
        if selector is None:
            continue
        placement = selector.decode_placement(len(adapter.decoder_layers))
        if placement is None:
            continue
        if found is not None:
            raise ConfigError(
                f"{found.method.name} and {method.name} both choose among cached tokens while "
                "decoding, and one of a chain can; give the other dynamic=False"
            )
        found = DecodeStep(method, selector, placement)
    if found is None:
        return None
    for step in steps:
        at = step.placement
        if at.until is not None and at.layer <= found.reads < at.until:
            raise ConfigError(
                f"{found.method.name} reads the attention of decoder layer {found.reads} while "
                f"decoding, but of {step.method.name} some tokens bypass layers {at.layer} to "
                f"{at.until - 1}; read another layer, or none (dynamic=False)"
            )
    return found


def _note(
    step: DecodeStep, state: ForwardState, number: int, hidden: Tensor, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Behind the placements up to the layer that is read, note what there is to choose from."""
    if number == step.reads:
        open_selection(step, state)
    return kwargs


def open_selection(step: DecodeStep, state: ForwardState) -> None:
    """Leave in the cache layer that is read what later steps choose from."""
    assert state.cache is not None
    held, rows = state.cache.layers[step.reads], state.last
    if not isinstance(held, CompressedLayerMixin):
        return
    device, old = rows.index.device, held.selection
    visual = rows.index.new_zeros(rows.index.shape[0], state.past + rows.length).bool()
    counts = [0] * len(visual)
    for bucket in state.buckets:
        if not step.covers(bucket.images[0]):
            continue
        here = bucket.to(device)
        visual[here.sample[:, None], here.positions + state.past] = True
        for image in here.images:
            counts[image.sample] += step.placement.budget.resolve(here.num_visual)
    num_keep = torch.tensor(counts, device=device)
    if old is None and not any(map(step.covers, state.images)):
        return
    if old is not None:
        visual[:, : old.visual.shape[1]] |= old.visual.to(device)
        num_keep = num_keep + old.num_keep.to(device)
    dtype = torch.promote_types(state.plan.adapter.language_model.dtype, torch.float32)
    fresh = Selection(
        visual=visual,
        num_keep=num_keep,
        attention=visual.to(dtype) * 0,
        selected=visual.clone(),
        begun=torch.zeros_like(num_keep, dtype=torch.bool),
    )
    held.selection = None
    held.selected([fresh])


class Decoding:
    """The choice in one call that brings text alone.

    Args:
        step: The placement.
        cache: Its layer that is read holds a selection.
        implementation: Attention implementation.
        valid: `[B, Q]` bool, the call's tokens that are no padding; None for all.
    """

    def __init__(
        self, step: DecodeStep, cache: Cache, implementation: str | None, valid: Tensor | None
    ) -> None:
        self.step, self.cache, self.valid = step, cache, valid
        self.kind = masks.check_implementation(implementation)
        self.hidden: Tensor | None = None  # [B, Q, V] bool, what deeper layers do not see
        self._masks: dict[tuple[int, int], tuple[Any, ...]] = {}

    @classmethod
    def of(
        cls,
        step: DecodeStep | None,
        cache: Cache | None,
        implementation: str | None,
        valid: Tensor | None = None,
    ) -> StageCall | None:
        """The part of the stage in a call; None where there is nothing to choose from."""
        if step is None or cache is None or len(cache.layers) <= step.reads:
            return None
        held = cache.layers[step.reads]
        if not isinstance(held, CompressedLayerMixin) or held.selection is None:
            return None
        call = cls(step, cache, implementation, valid)
        return StageCall(layer_kwargs=call.layer_kwargs, attend=call.attend)

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
        if torch.compiler.is_compiling():
            return self._narrow(positions, mask, hidden)
        key = (id(positions), id(mask))
        if key not in self._masks:  # what has the ids is kept with it
            self._masks[key] = (self._narrow(positions, mask, hidden), positions, mask)
        narrowed: Tensor = self._masks[key][0]
        return narrowed

    def _narrow(self, positions: Tensor, mask: Tensor | None, hidden: Tensor) -> Tensor:
        """The mask without what is hidden; slots behind those in use are masked as they were."""
        assert self.hidden is not None
        V, device = self.hidden.shape[2], hidden.device
        S = positions.shape[1] if mask is None else mask.shape[-1]
        places = _padded(positions.to(device), S, V)
        index = places[:, None].expand(-1, self.hidden.shape[1], -1)
        seen = ~F.pad(self.hidden.to(device), (0, 1)).gather(2, index)  # [B, Q, S]
        if self.kind == "flash":
            return seen[:, 0] if mask is None else mask.bool() & seen[:, 0]
        if mask is None:
            return masks.as_kind(seen, self.kind, hidden.dtype)
        if mask.dtype == torch.bool:
            return mask & seen[:, None]
        return mask.masked_fill(~seen[:, None], torch.finfo(mask.dtype).min)


def _padded(positions: Tensor, size: int, last: int) -> Tensor:
    """`[B, size]`: positions, none behind `last`, and `last` for slots behind those in use."""
    if spare := size - positions.shape[1]:  # a fill value would be a constant of a compiled graph
        positions = F.pad(positions, (0, spare), value=last)
    return positions.clamp(max=last)
