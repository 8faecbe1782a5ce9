"""Evict images behind the gist tokens that stand for them: `Stage.CACHE` of a `GistEvictor`.

Up to the end of an image's run of gist tokens the model is the untouched one. Rows behind it do not
see what the method evicts: one mask for all layers, made of token ids alone. In each layer of a
prefill that leaves the cache behind the attention, so what is decoded later needs no mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from vispress.devices import sent
from vispress.errors import ConfigError, UnsupportedModelError
from vispress.methods.base import Compressor
from vispress.methods.gist_evictor import GistEvictor
from vispress.runtime.forward.apply_placement import note_all_kept
from vispress.runtime.forward.gist_runs import NEVER, Sight, find_sight
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.kv_cache.evicting import cut_layer, refuse_fixed, staying_slots
from vispress.runtime.kv_cache.slots import CompressedLayerMixin, Slots
from vispress.runtime.plan.plan import vocabulary_of
from vispress.runtime.stages.base import Binding, RuntimeStage, StageCall, Watched
from vispress.runtime.tokens import masks
from vispress.types import Stage

CARRIES = frozenset({Stage.CACHE})


def bind(binding: Binding) -> RuntimeStage | None:
    """Make the stage of a chain with a method whose gist tokens stand for images.

    Raises:
        ConfigError: The token is no word of the model's, or the chain cannot work.
    """
    found: GistEviction | None = None
    for bound in binding.carried_by(CARRIES):
        evictor = bound.method.gist_evictor()
        if evictor is None:
            continue
        if found is not None:
            raise ConfigError(
                f"{bound.method.name} and {found.method.name} both have tokens that stand for "
                "images, and one of a chain can; leave one out"
            )
        found = GistEviction(bound.method, evictor)
    if found is None:
        return None
    found.check_chain(binding)
    found.check_token(binding)
    binding.notes.append(
        f"{found.method.name}: what stands behind an image's tokens {found.token(binding)} sees "
        "these in its place; behind the prefill it leaves the KV cache of every layer"
    )
    return RuntimeStage(
        carries=CARRIES,
        open=found.open,
        order=60,
        refuse=found.refuse,
        watched_layers=frozenset(range(len(binding.adapter.decoder_layers))),
    )


@final
@dataclass(frozen=True, eq=False)
class GistEviction:
    """A method with gist tokens.

    Args:
        method: The compressor.
        evictor: What it evicts.
    """

    method: Compressor
    evictor: GistEvictor

    def token(self, binding: Binding) -> int:
        """Give the token's id on a model."""
        given = self.evictor.gist_token
        return vocabulary_of(binding.adapter) - 1 if given is None else given

    def check_chain(self, binding: Binding) -> None:
        """Refuse methods that need what is hidden or evicted here.

        Raises:
            ConfigError: Names both.
        """
        name = self.method.name
        for other in binding.methods:
            parts = other.pair_masker(), other.cached_selector(), other.cache_evictor()
            if any(part is not None for part in parts):
                raise ConfigError(
                    f"{other.name} needs visual tokens in the KV cache, from which {name} evicts "
                    "all of them; leave one of them out"
                )
        for bound in binding.placements:
            if bound.placement.queries is not None:
                raise ConfigError(
                    f"{bound.method.name} ranks image tokens by the attention of rows that do not "
                    f"see them under {name}; leave one of them out"
                )

    def check_token(self, binding: Binding) -> None:
        """Refuse a token that the model has no embedding of, or that stands for pixels.

        Raises:
            ConfigError: Says what to call.
        """
        token, words = self.token(binding), vocabulary_of(binding.adapter)
        if token >= words:
            raise ConfigError(
                f"{self.method.name}: token_id={token} has no embedding, the model's vocabulary "
                f"holds {words} words (0 to {words - 1}); add the word to the tokenizer and call "
                f"model.resize_token_embeddings({token + 1}) before compress_model"
            )
        if token in binding.adapter.placeholders().values():
            raise ConfigError(
                f"{self.method.name}: token_id={token} is the model's placeholder of visual "
                "tokens; give the id of a word of its own"
            )

    def refuse(self, implementation: str | None, cache: Cache | None) -> None:
        """Refuse a cache whose layers hold a fixed number of tokens.

        Raises:
            UnsupportedModelError: It is a static or a sliding cache.
        """
        refuse_fixed(self.method.name, cache)

    def open(self, state: ForwardState) -> StageCall | None:
        """Begin a prefill.

        Raises:
            ConfigError: Gist tokens do not stand where they must.
            UnsupportedModelError: A mask is needed that the attention does not take.
        """
        if not state.images:
            return None
        place = partial(note_all_kept, state)
        sight = find_sight(state, self.method.name, prefix=self.evictor.evicts_prefix)
        if sight is None:
            return StageCall(place=place)
        kind = masks.check_implementation(state.plan.implementation)
        if kind == "flash" and sight.narrows(state):
            raise UnsupportedModelError(
                f"{self.method.name} hides images from what stands behind their tokens "
                f"{state.plan.gist_token} in this call, which needs a dense mask, and "
                f"{state.plan.implementation!r} takes none; use 'sdpa' or 'eager', or run the "
                "prompt up to these tokens first and the rest on its KV cache"
            )
        call = _Hiding(state, sight, kind)
        return StageCall(
            own_from=0,
            place=place,
            layer_kwargs=call.narrow,
            attend=call.attend,
            remarks=partial(_remarks, self.method.name, sight),
        )


_Staying = tuple[Slots, Tensor, tuple[Tensor, Slots]]
"""What a layer holds, which of it leaves, and what `staying_slots` found."""


@dataclass(eq=False)
class _Hiding:
    """What one call hides and evicts.

    Args:
        state: The call.
        sight: How far its tokens are seen.
        kind: Of the attention's masks.
    """

    state: ForwardState
    sight: Sight
    kind: str
    # keys are ids, of what stands beside the value: so it lives, and no other gets its id
    _masks: dict[tuple[int, int, int], tuple[object, Tensor]] = field(default_factory=dict)
    _cuts: dict[int, _Staying] = field(default_factory=dict)
    _staying: dict[int, _Staying] = field(default_factory=dict)  # by layer

    def narrow(self, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Take from a layer's mask what its rows do not see, and find what its cache is to hold.

        Both outside of its graph, where it is compiled: what is found again by an object's id would
        be traced anew for each call.
        """
        state, mask = self.state, kwargs.get("attention_mask")
        held = state.cache_layer(number)
        after = held.pending if isinstance(held, CompressedLayerMixin) else None
        if after is not None:
            self._staying[number] = self._cut(after)
        if self.kind == "flash":
            return kwargs
        rows = state.rows_at(number).to(hidden.device)
        key = id(mask), id(rows), id(after)
        if key not in self._masks:
            columns = rows.index
            if after is not None:
                columns = after.positions.to(hidden.device) - state.past
            blocked = rows.index[:, :, None] >= self._until(columns)[:, None]
            if mask is None:
                allow = (columns[:, None] <= rows.index[:, :, None]) & ~blocked
                new = masks.as_kind(allow, self.kind, hidden.dtype)
            elif mask.dtype == torch.bool:
                new = mask & ~blocked[:, None]
            else:
                new = mask.masked_fill(blocked[:, None], torch.finfo(mask.dtype).min)
            self._masks[key] = (mask, rows, after), new
        return kwargs | {"attention_mask": self._masks[key][1]}

    def _until(self, columns: Tensor) -> Tensor:
        """How far tokens at positions `[B, S]` of the chunk are seen; earlier ones are always."""
        until = sent(self.sight.until, columns.device).gather(1, columns.clamp(min=0))
        return until.masked_fill(columns < 0, NEVER)

    def attend(self, number: int, watched: Watched) -> Tensor | None:
        """Cut the layer's cache, which its attention has been handed by now."""
        state = self.state
        if state.cache is None or state.mode != "run" or number in state.evicted:
            return watched.mask
        layer = state.cache.layers[number]
        assert isinstance(layer, CompressedLayerMixin)
        slots, gone, stays = self._staying[number]
        state.evicted[number] = slots, gone
        cut_layer(layer, *stays)
        return watched.mask

    def _cut(self, slots: Slots) -> _Staying:
        """What stays of slots behind their attention; one object for layers that hold the same."""
        if id(slots) not in self._cuts:
            state = self.state
            gone = self._until(slots.positions - state.past) != NEVER
            gone = (gone if slots.valid is None else gone & slots.valid)[:, None]
            drops = list(self.sight.texts)
            for bucket in state.buckets:
                for image in bucket.images:
                    drops[image.sample] += bucket.num_visual
            self._cuts[id(slots)] = slots, gone, staying_slots(slots, gone, drops)
        return self._cuts[id(slots)]


def _remarks(name: str, sight: Sight) -> Sequence[str]:
    """Say how many tokens stand for images in this call."""
    text = f", and {sum(sight.texts)} text tokens leave" if any(sight.texts) else ""
    return (f"{name}: {sight.gists} tokens of the prompt stand for its images{text}",)
