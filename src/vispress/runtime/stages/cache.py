"""Evict visual tokens from the KV cache behind the prefill, layer by layer: `Stage.CACHE`.

Each layer's attention runs on all keys of the chunk; then what the method does not keep leaves that
layer's cache. Rows of the chunk that stand behind a prompt's end (answers, drafts) see what a token
decoded later would see: the evicted keys are masked for them, with a cache or without one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import final

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from vispress.devices import sent
from vispress.errors import ConfigError, UnsupportedModelError
from vispress.methods.base import Compressor
from vispress.methods.cache_evictor import CachedTokens, CacheEvictor
from vispress.runtime.forward.apply_placement import note_all_kept
from vispress.runtime.forward.bucket_view import BucketView
from vispress.runtime.forward.setup import read_of
from vispress.runtime.forward.signals import rows_of
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.hooks.head_shards import HeadShards
from vispress.runtime.kv_cache.evicting import (
    Placed,
    evict_slots,
    gone_slots,
    merge_slots,
    part_of,
    refuse_fixed,
    tokens_at,
    without_slots,
)
from vispress.runtime.kv_cache.slots import CompressedLayerMixin
from vispress.runtime.stages.base import Binding, RuntimeStage, StageCall, Watched
from vispress.runtime.tokens import masks
from vispress.runtime.tokens.images import Bucket
from vispress.types import Placement, Signal, Stage

CARRIES = frozenset({Stage.CACHE})


def bind(binding: Binding) -> RuntimeStage | None:
    """Make the stage of a chain with a method that evicts from the cache.

    Raises:
        ConfigError: Two methods do, or another stage must find cached tokens where they were.
    """
    found: Eviction | None = None
    for bound in binding.carried_by(CARRIES):
        if bound.method.gist_evictor() is not None:  # of a stage beside this one
            continue
        evictor = bound.method.cache_evictor()
        if evictor is None or found is not None:
            raise ConfigError(
                f"{bound.method.name}: a placement in the KV cache needs a CacheEvictor, and there "
                "can be one in a chain; leave one out"
            )
        found = Eviction(bound.method, evictor, bound.placement)
    if found is None:
        return None
    for other in binding.methods:
        if other.pair_masker() is not None or other.cached_selector() is not None:
            raise ConfigError(
                f"{other.name} needs all visual tokens in the KV cache, from which "
                f"{found.method.name} evicts; leave one of them out"
            )
    first = found.placement.layer
    binding.notes.append(
        f"{found.method.name}: the prefill runs on all that is there; behind it, visual tokens "
        f"leave the KV cache of layers from {first} on"
    )
    layers = frozenset(range(first, len(binding.adapter.decoder_layers)))
    return RuntimeStage(
        carries=CARRIES, open=found.open, order=60, refuse=found.refuse, watched_layers=layers
    )


@final
@dataclass(frozen=True, eq=False)
class Eviction:
    """A placement in the cache.

    Args:
        method: The compressor.
        evictor: What it decides there.
        placement: Its layer is the first whose cache is cut.
    """

    method: Compressor
    evictor: CacheEvictor
    placement: Placement

    def refuse(self, implementation: str | None, cache: Cache | None) -> None:
        """Refuse a cache whose layers hold a fixed number of tokens.

        Raises:
            UnsupportedModelError: It is a static or a sliding cache.
        """
        refuse_fixed(self.method.name, cache)

    def open(self, state: ForwardState) -> StageCall | None:
        """Begin a prefill."""
        if not state.images:
            return None
        call = _Evicting(self, state, caches=state.cache is not None)
        cuts = any(map(self.loses, state.buckets))  # padding rows are then the same without a cache
        return StageCall(
            own_from=self.placement.layer if cuts else None,
            place=partial(note_all_kept, state),
            attend=call.attend,
            end=call.end,
            remarks=call.remarks,
        )

    def num_keep(self, bucket: Bucket) -> int:
        """Tokens of each image of a bucket that stay cached."""
        return self.placement.budget.resolve(bucket.num_visual)

    def loses(self, bucket: Bucket) -> bool:
        """Whether tokens of a bucket leave the cache: a prompt asks, and not all are kept."""
        passes = bucket.passes(self.method.needs) or not bucket.images[0].prompt.ends
        return not passes and self.num_keep(bucket) < bucket.num_visual

    def refuse_answers(self, implementation: str | None, merges: bool) -> None:
        """Refuse answers in one call with their prompt where no mask can stand for eviction.

        Raises:
            UnsupportedModelError: Says why, and what works.
        """
        why = ""
        if masks.check_implementation(implementation) == "flash":
            why = "FlashAttention has one mask for all rows"
        elif merges or self.evictor.allocates:
            why = "what stays is merged" if merges else "that is known behind the last layer alone"
        if why:
            raise UnsupportedModelError(
                f"{self.method.name}: answers or drafts stand in one call with the prompt and must "
                f"not see what is evicted behind it, but {why}; run the prompt alone first"
            )


@dataclass(eq=False)
class _Evicting:
    """What leaves the cache in one call.

    Args:
        eviction: The placement.
        state: The call.
        shown: By layer, what a method that allocates is shown in the end.
        decided: By layer, what stays.
        caches: Whether there is a cache to evict from.
        kept: Of each layer that was cut, tokens that stay cached and tokens there were.
    """

    eviction: Eviction
    state: ForwardState
    shown: dict[int, list[tuple[Bucket, Tensor, CachedTokens]]] = field(default_factory=dict)
    decided: dict[int, list[Placed]] = field(default_factory=dict)
    caches: bool = False
    kept: dict[int, tuple[int, int]] = field(default_factory=dict)
    shards: HeadShards | None = None  # processes that have the other heads

    def attend(self, number: int, watched: Watched) -> Tensor | None:
        """Decide for a layer, mask what is evicted for rows behind prompts, and evict it."""
        state, eviction = self.state, self.eviction
        if state.mode != "run" or number < eviction.placement.layer:
            return watched.mask
        if number not in self.decided:  # a checkpointed layer that runs again decides the same
            with torch.no_grad():  # which must not save tensors that its second run does not
                self._decide_layer(number, watched)
        placed, mask = self.decided[number], watched.mask
        answers = self._answers(number, watched.query.device) if placed or self.shown else None
        if answers is not None:
            merges = any(each.plan.assign is not None for each in placed)
            eviction.refuse_answers(state.plan.implementation, merges)
            mask = without_slots(placed, answers, watched.query, watched.key, mask)
        if state.cache is not None:
            self._evict(number, placed)
        return mask

    def _decide_layer(self, number: int, watched: Watched) -> None:
        shown, eviction = self._show(number, watched), self.eviction
        if eviction.evictor.allocates:  # the budget is shared out behind the last layer
            self.shown[number], shown = shown, []
        self.decided[number] = [self._decide(*one, eviction.num_keep(one[0])) for one in shown]

    def end(self) -> None:
        """Share the budget of a method that allocates among the layers, and evict."""
        evictor, layers = self.eviction.evictor, sorted(self.shown)
        if self.state.cache is None or not layers:
            return
        for entries in zip(*(self.shown[layer] for layer in layers), strict=True):
            measures = [evictor.measure(tokens) for _, _, tokens in entries]
            shares = evictor.allocate(measures, self.eviction.num_keep(entries[0][0]))
            for layer, (bucket, slots, tokens), counts in zip(layers, entries, shares, strict=True):
                for row, count in enumerate(counts):
                    if count < bucket.num_visual:
                        own = bucket.row(row), slots[row : row + 1], tokens.row(row), count
                        self.decided[layer].append(self._decide(*own))
        for layer in layers:
            self._evict(layer, self.decided[layer])

    def remarks(self) -> Sequence[str]:
        """Say what stayed cached, or why nothing left."""
        name = self.eviction.method.name
        if not self.caches:
            what = "no KV cache in this call; answers in it see what one would hold"
            return (f"{name}: {what}",)
        if not self.kept:
            return (f"{name}: every visual token stays cached",)
        kept, total = (sum(each) for each in zip(*self.kept.values(), strict=True))
        return (f"{name}: {kept / total:.1%} of the visual tokens stay cached",)

    def _show(self, number: int, watched: Watched) -> list[tuple[Bucket, Tensor, CachedTokens]]:
        """Each bucket that loses tokens in this layer, its slots, and what the method is shown."""
        state, eviction = self.state, self.eviction
        query, key, value, mask, softmax, self.shards = watched
        buckets = [b.to(query.device) for b in state.buckets if eviction.loses(b)]
        if not buckets:
            return []
        assert state.layout is not None
        assert state.asking is not None
        queries = eviction.evictor.queries
        placement = Placement(
            stage=Stage.CACHE, budget=eviction.placement.budget, layer=number, queries=queries
        )
        read = read_of(placement, number, state.images, state.layout, state.asking)
        read.reads.add(Signal.QUERY_ATTENTION)
        rows = state.rows_at(number).to(query.device)
        state.read(read, rows, query, key, mask, softmax)
        shown = []
        for bucket in buckets:
            view = BucketView(bucket)
            slots = read.slots(view.local(rows))
            samples = [image.sample for image in bucket.images]
            tokens = CachedTokens(
                layer=(number, state.plan.num_layers),
                keys=tokens_at(key, samples, slots, self.shards),
                values=tokens_at(value, samples, slots, self.shards),
                attention=rows_of(read, view, state.plan.backend),
                index=bucket.index,
                num_original=bucket.images[0].num_visual,
            )
            shown.append((bucket, slots, tokens))
        return shown

    def _decide(self, bucket: Bucket, slots: Tensor, tokens: CachedTokens, count: int) -> Placed:
        plan = part_of(self.eviction.evictor.plan_cache(tokens, count), self.shards)
        return Placed([image.sample for image in bucket.images], slots, plan)

    def _answers(self, number: int, device: torch.device) -> Tensor | None:
        """`[B, P]` bool: rows that come behind the prompts that decided; None for none."""
        layout, found = self.state.layout, None
        assert layout is not None
        for image in self.state.images:
            stop, end = image.prompt.stop, layout.documents[image.prompt.document].stop
            if image.prompt.ends and stop < end:
                found = torch.zeros(layout.batch, layout.length) if found is None else found
                found[image.sample, stop:end] = 1
        if found is None:
            return None
        rows = self.state.rows_at(number).to(device)
        return sent(found.bool(), device).gather(1, rows.index)

    def _evict(self, number: int, placed: Sequence[Placed]) -> None:
        """Cut a layer's cache to what stays."""
        state = self.state
        assert state.cache is not None
        layer = state.cache.layers[number]
        if not placed or number in self.kept:
            return
        assert isinstance(layer, CompressedLayerMixin)
        drops = [0] * len(layer.slots.positions)
        for each in placed:
            for sample in each.samples:
                drops[sample] += each.slots.shape[1] - each.plan.keep.shape[2]
            if each.plan.assign is not None:
                merge_slots(layer, each)
        gone = gone_slots(placed, len(drops), layer.physical)
        state.evicted[number] = layer.slots, gone
        evict_slots(layer, gone, drops)
        total = sum(len(bucket.images) * bucket.num_visual for bucket in state.buckets)
        self.kept[number] = total - sum(drops), total
