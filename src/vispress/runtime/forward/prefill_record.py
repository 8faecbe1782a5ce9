"""Remember a prefill; a report is made of it only when one is asked for."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vispress.kinds import Stage
from vispress.runtime.forward.apply_placement import asks_prompt
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.kv_cache.slots import CompressedLayerMixin, Slots
from vispress.runtime.plan.bound import BoundPlacement
from vispress.runtime.tokens.images import Image
from vispress.runtime.tokens.live_tokens import LiveTokens

_TELLING = (Stage.MASK, Stage.CACHE, Stage.COMPUTE)
"""Stages that say themselves what they did in a call."""


@dataclass(frozen=True, eq=False)
class Alive:
    """Tokens that are alive in some layers; read off when a report is asked for.

    Args:
        rows: Live tokens of the chunk.
        slots: What the layers' cache held behind the prefill; None where it is not short.
        past: Logical length before it.
        before: `[B, past]` bool, what was real of that; None for all.
        valid: `[B, Q]` bool, real tokens of the chunk where all of it runs; None for all.
    """

    rows: LiveTokens
    slots: Slots | None
    past: int
    before: Tensor | None
    valid: Tensor | None

    @cached_property
    def tokens(self) -> Tensor:
        """`[B, past + Q]` bool."""
        rows, slots = self.rows, self.slots
        batch, full = rows.index.shape[0], self.past + rows.length
        if slots is not None:
            alive = torch.zeros(batch, full + 1, dtype=torch.bool, device=slots.positions.device)
            target = slots.positions
            target = target if slots.valid is None else target.masked_fill(~slots.valid, full)
            return alive.scatter(1, target, True)[:, :-1]
        chunk = rows.alive if self.valid is None else self.valid
        before = torch.ones(batch, self.past, dtype=torch.bool, device=chunk.device)
        if self.before is not None:
            before = self.before.to(chunk.device)
        return torch.cat([before, chunk], dim=1)


@dataclass(frozen=True, eq=False)
class Cached:
    """What a layer holds that was cut behind its attention; read off when a report is asked for.

    Args:
        slots: Of the layer before.
        gone: `[B, Hkv or 1, S]` bool, slots that left.
        length: Logical length behind the prefill.
    """

    slots: Slots
    gone: Tensor
    length: int

    @cached_property
    def tokens(self) -> Tensor:
        """`[B, Hkv or 1, past + Q]` bool."""
        slots, full = self.slots, self.length
        stays = ~self.gone if slots.valid is None else ~self.gone & slots.valid[:, None]
        index = slots.positions[:, None].expand_as(stays)
        # where several slots name one position, those that hold nothing must not clear it
        cached = torch.zeros(*stays.shape[:2], full + 1, dtype=torch.bool, device=stays.device)
        return cached.scatter(2, index.masked_fill(~stays, full), True)[..., :-1]


@dataclass(eq=False)
class PrefillRecord:
    """The facts of one prefill; tensors stay on their device.

    Args:
        placements: In the order they acted.
        notes: Remarks made when the model was compressed.
        images: With their traces.
        alive: What is alive in each decoder layer; layers with the same rows share one object.
        layer_cached: Of decoder layers whose cache was cut behind their prefill, what each KV head
            holds.
        kv_bytes: Keys and values in the cache after the prefill.
        width: LLM hidden size.
        mlp_width: LLM MLP size.
        past: Logical length before the prefill.
        encoder: Name of the method that merges in the vision encoder, if one does.
        remarks: What stages say of the call, when a report is asked for.
        trains: Whether plans that can be soft were.
        mlp_shares: Share of each layer's MLP that visual tokens went through; None for all.
    """

    placements: Sequence[BoundPlacement]
    notes: Sequence[str]
    images: Sequence[Image]
    alive: Sequence["Alive"]
    layer_cached: Mapping[int, Cached]
    kv_bytes: int
    width: int
    mlp_width: int
    past: int
    encoder: str | None = None
    remarks: Sequence[Callable[[], Sequence[str]]] = ()
    trains: bool = False
    mlp_shares: Sequence[float] | None = None

    @property
    def layer_alive(self) -> Sequence[Tensor]:
        """`[B, past + Q]` bool a decoder layer."""
        return [alive.tokens for alive in self.alive]

    @classmethod
    def of(
        cls,
        state: ForwardState,
        kv_bytes: int,
        remarks: Sequence[Callable[[], Sequence[str]]],
    ) -> "PrefillRecord":
        """Make the record of a finished call."""
        merging = (one.name for one in state.plan.methods if one.changes_encoder())
        config: Any = state.plan.adapter.language_model.config
        layers, length = _alive_layers(state), state.past + state.rows[0][1].length
        return cls(
            state.plan.placements,
            state.plan.notes,
            state.images,
            layers,
            {layer: Cached(*cut, length) for layer, cut in state.evicted.items()},
            kv_bytes,
            config.hidden_size,
            config.intermediate_size,
            state.past,
            next(merging, None),
            remarks,
            state.trains,
            state.plan.mlp_shares,
        )

    def idle(self) -> list[str]:
        """Say which methods left everything as it was, and why: a budget may hold all tokens."""
        found = []
        for number in sorted({bound.compressor for bound in self.placements}):
            bounds = [bound for bound in self.placements if bound.compressor == number]
            if bounds[0].placement.stage in _TELLING:
                continue
            acted = [bound for image in self.images for bound in self._dropping(image, number)]
            if not any(acted):
                name = bounds[0].method.name
                found.append(f"{name}: dropped nothing in this call; {self._why(bounds)}")
        if self.encoder is not None and self.images:
            tokens = [image.capture.encoder_tokens[image.number] for image in self.images]
            if all(entered == left for entered, *_, left in tokens):
                why = "its budget holds all tokens of the encoder"
                found.append(f"{self.encoder}: merged nothing in this call; {why}")
        return found

    def _dropping(self, image: Image, number: int) -> Iterator[bool]:
        """For each placement of a compressor, whether it dropped any token of an image."""
        left = image.num_visual if image.shown is None else len(image.shown)
        for trace in image.trace:
            bound = self.placements[trace.step]
            if bound.compressor == number:
                yield len(trace.index) < left
            if bound.placement.stage in (Stage.PRE_LLM, Stage.IN_LLM):
                left = len(trace.index)

    def _why(self, bounds: Sequence[BoundPlacement]) -> str:
        images, first = self.images, bounds[0]
        if self.trains and first.method.softens:
            return "in training what it would drop counts less"
        if first.method.needs == "video" and all(image.modality == "image" for image in images):
            return "it is made for videos, and images pass whole"
        if asks_prompt(first) and not any(image.prompt.ends for image in images):
            return "no prompt asks about the images"
        if all(bound.placement.images == "earlier" for bound in bounds):
            return "it acts on images before the last, and there is one"
        if all(bound.placement.adaptive for bound in bounds):
            return "it chose to keep all"
        return "its budget holds all visual tokens"


def _alive_layers(state: ForwardState) -> list[Alive]:
    """What is alive in each layer; layers that hold the same share one object."""
    seen: dict[int, tuple[object, Alive]] = {}
    held_layers = () if state.cache is None else state.cache.layers
    mask = state.mask_2d
    before = None if mask is None else mask[:, : state.past]
    found = []
    for layer in range(state.plan.num_layers):
        rows = state.rows_at(layer)
        held = held_layers[layer] if layer < len(held_layers) else None
        slots = None
        if isinstance(held, CompressedLayerMixin):
            slots = held.last_stored if held.attended is None else held.attended
        slots = state.evicted[layer][0] if layer in state.evicted else slots
        slots = None if slots is None or not slots.logical else slots
        same = rows if slots is None else slots  # held in `seen`, so that its id stays its own
        if id(same) not in seen:
            valid = state.valid_rows(rows) if rows.whole else None
            seen[id(same)] = same, Alive(rows, slots, state.past, before, valid)
        found.append(seen[id(same)][1])
    return found
