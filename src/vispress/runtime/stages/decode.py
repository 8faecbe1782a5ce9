"""Choose among cached visual tokens while decoding: one layer is read, deeper ones see a part.

Every token that is fed behind a prefill is a step, however many a call brings: so several tokens at
once (assisted decoding, a further turn) give what they give one by one. A call with images is a
prefill: it sees the whole cache, and the next step is again the first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from vispress.adapters.base import ModelAdapter
from vispress.errors import ConfigError
from vispress.methods.base import Compressor
from vispress.methods.cached_selector import CachedSelector, Selection
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.kv_cache.slots import CompressedLayerMixin
from vispress.runtime.plan.bound import BoundPlacement
from vispress.runtime.plan.plan import Plan
from vispress.runtime.stages.base import Binding, Prepared, RuntimeStage, StageCall, StepCall
from vispress.runtime.stages.decoding import Decoding
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
        open_step=step.open_step,
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

    def open_step(self, plan: Plan, cache: Cache, step: Prepared) -> StepCall | None:
        """Begin a prepared decode step."""
        return Decoding.of_step(self, plan, cache, step)


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
