"""Mask (text row, visual token) pairs in the attention of decoder layers: `Stage.MASK`.

Nothing is dropped. In each layer the attention rows of text are worked out from q and k, the method
says which pairs stay, and the attention runs with the others masked. The layer's cache remembers
how its text rows attended to visual tokens, so that a token fed later is masked as it is in the
whole sequence (`tokens.pair_masks`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer

from vispress.devices import sent
from vispress.errors import ConfigError, UnsupportedModelError
from vispress.methods.base import Compressor
from vispress.methods.pair_masker import PairMasker
from vispress.runtime.forward.apply_placement import choose
from vispress.runtime.forward.decision import Decision
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.kv_cache.pair_memory import PairSlots
from vispress.runtime.kv_cache.slots import CompressedLayerMixin
from vispress.runtime.plan.bound import BoundPlacement
from vispress.runtime.plan.plan import Plan
from vispress.runtime.stages.base import (
    Binding,
    Prepared,
    RuntimeStage,
    StageCall,
    StepCall,
    Watched,
)
from vispress.runtime.tokens import masks
from vispress.runtime.tokens.pair_masks import LayerPairs, PairMasks
from vispress.runtime.tokens.pair_steps import StepPairs
from vispress.types import Stage

CARRIES = frozenset({Stage.MASK})


def bind(binding: Binding) -> RuntimeStage | None:
    """Make the stage of a chain with a method that masks pairs.

    Raises:
        ConfigError: Two methods mask pairs, or attention is read in advance of a masking layer.
    """
    step = find_pair_step(binding)
    if step is None:
        return None
    binding.notes.append(
        f"{step.method.name}: drops no token; from decoder layer {step.first} on, pairs of text "
        "rows and image tokens are masked, while decoding too"
    )
    layers = frozenset(range(step.first, len(binding.adapter.decoder_layers)))
    return RuntimeStage(
        carries=CARRIES,
        open=step.open,
        order=40,
        open_step=step.open_step,
        refuse=step.refuse,
        watched_layers=layers,
        remembers=step.method,
    )


@final
@dataclass(frozen=True, eq=False)
class PairStep:
    """A placement that masks pairs.

    Args:
        method: The compressor.
        masker: What decides.
        first: Decoder layer from which pairs are masked.
    """

    method: Compressor
    masker: PairMasker
    first: int

    def refuse(self, implementation: str | None, cache: Cache | None) -> None:
        """Refuse attention without a dense mask, and a cache that cannot remember attention.

        Raises:
            UnsupportedModelError: FlashAttention, or a static cache.
        """
        if masks.check_implementation(implementation) == "flash":
            raise UnsupportedModelError(
                f"{self.method.name} masks pairs of text rows and image tokens, which needs a "
                f"dense mask, and {implementation!r} takes none; use 'sdpa' or 'eager', or set "
                "mass=1.0, which masks nothing"
            )
        kinds = [] if cache is None else [type(layer) for layer in cache.layers]
        kinds.append(getattr(cache, "layer_class_to_replicate", None) or object)
        if any(issubclass(kind, StaticLayer) for kind in kinds):
            raise UnsupportedModelError(
                f"{self.method.name} remembers in the cache how text attended to images, which "
                "grows with the text: a static cache has no place for it; use DynamicCache()"
            )

    def open(self, state: ForwardState) -> StageCall | None:
        """Begin a call that brings images, or goes on from a cache that remembers some."""
        layers = [] if state.cache is None else state.cache.layers
        held = layers[self.first] if len(layers) > self.first else None
        remembers = isinstance(held, CompressedLayerMixin) and held.pairs is not None
        if not state.images and not remembers:
            return None
        pairs = _Pairs(state, self.first, self._masks(state))
        return StageCall(
            own_from=self.first,
            place=partial(_place, state),
            layer_kwargs=pairs.hold,
            attend=pairs.attend,
            remarks=partial(_remarks, self.method.name, pairs.masks),
        )

    def open_step(self, plan: Plan, cache: Cache, step: Prepared) -> StepCall | None:
        """Begin a prepared decode step on a cache that remembers pairs."""
        held = cache.layers[self.first]
        if not isinstance(held, CompressedLayerMixin) or held.pairs is None:
            return None
        if masks.check_implementation(plan.implementation) == "flash":
            self.refuse(plan.implementation, cache)
        pairs = StepPairs(self.masker, cache.layers, plan.shards)
        return StepCall(range(self.first, len(cache.layers)), pairs.attend)

    def _masks(self, state: ForwardState) -> PairMasks:
        live = state.rows[0][1]
        visual, texts = None, live.counts
        if state.images:
            marks = torch.zeros(live.index.shape, dtype=torch.bool)
            for image in state.images:
                marks[image.sample, image.positions] = True
            text = ~marks if state.host_valid is None else state.host_valid & ~marks
            visual, texts = sent(marks, live.index.device), tuple(text.sum(1).tolist())
        keeps = state.cache is None and state.plan.adapter.language_model.training
        last = state.plan.num_layers - 1
        return PairMasks(self.masker, visual, texts, last, keeps=keeps)


@dataclass(frozen=True, eq=False)
class _Pairs:
    """The pairs of one call, layer by layer."""

    state: ForwardState
    first: int
    masks: PairMasks
    here: dict[int, PairSlots] = field(default_factory=dict)

    def hold(self, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Let a masking layer's cache keep every slot: what it remembers counts them.

        Where its tokens stand is found here, outside of its graph where it is compiled: what is
        found again by an object's id would be traced anew for each call.
        """
        if number >= self.first:
            state = self.state
            held = state.cache_layer(number)
            if isinstance(held, CompressedLayerMixin):
                held.keeps_all = True
            rows = state.rows_at(number).to(hidden.device)
            real = None if min(rows.counts) == rows.size else state.row_validity(rows)
            self.here[number] = self.masks.places(rows, real)
        return kwargs

    def attend(self, number: int, watched: Watched) -> Tensor | None:
        """Give the mask without the pairs that the method leaves out."""
        state = self.state
        if state.mode != "run" or number < self.first:
            return watched.mask
        held = None if state.cache is None else state.cache.layers[number]
        pairs = LayerPairs(self.masks, number, self.here[number], held)
        query, key, _, mask, softmax, shards = watched
        return pairs.narrow(query, key, mask, softmax, shards)


def _place(state: ForwardState, bound: BoundPlacement, hidden: Tensor) -> Decision | None:
    """Note in each image that all of it is kept."""
    state.buckets = choose(state, bound, hidden).buckets
    return None


def _remarks(name: str, pairs: PairMasks) -> Sequence[str]:
    """Say what share of the pairs of text rows and visual tokens before them was masked."""
    if not pairs.counts:
        return ()
    masked, seen = torch.stack([pair.cpu() for pair in pairs.counts]).sum(0).tolist()
    share = masked / seen if seen else 0.0
    return (f"{name}: {share:.1%} of the pairs of text rows and image tokens were masked",)


def find_pair_step(binding: Binding) -> PairStep | None:
    """The placement of a chain of methods that masks pairs.

    Raises:
        ConfigError: Two methods mask pairs, or attention is read in advance of a masking layer.
    """
    found: PairStep | None = None
    layers = len(binding.adapter.decoder_layers)
    for method in binding.methods:
        masker = method.pair_masker()
        if masker is None:
            continue
        if found is not None:
            raise ConfigError(
                f"{found.method.name} and {method.name} both mask pairs of text rows and image "
                "tokens, and one of a chain can; leave one out"
            )
        (first,) = (p.layer for p in method.placements(layers) if p.stage is Stage.MASK)
        found = PairStep(method, masker, first)
    if found is None:
        return None
    for bound in binding.placements:
        at = bound.placement
        ahead = at.layer if at.queries is not None and at.attention_of == "next" else 0
        read = ahead if at.probe is None else at.probe
        if read >= found.first:
            raise ConfigError(
                f"{bound.method.name} reads the attention of decoder layer {read} before it runs, "
                f"without the pairs that {found.method.name} masks from layer {found.first} on; "
                f"start {found.method.name} at layer {read + 1}, or read an earlier layer"
            )
    return found
