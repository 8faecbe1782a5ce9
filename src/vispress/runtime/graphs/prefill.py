"""Record a prefill, from pixels to logits, and run it again for prompts of its layout.

One region holds all of it: encoder, choices, layers and head. For a layout all of that is a fixed
sequence (else it is no prefill that can be recorded), so there is nothing to decide between parts
of it, and a second region would only bring buffers between them.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticLayer

from vispress.adapters.base import ModelAdapter
from vispress.adapters.decoder import window_of
from vispress.runtime.attachment import ATTRIBUTE, Attachment
from vispress.runtime.forward.model_call import brings_images, knowing
from vispress.runtime.forward.prefill_record import PrefillRecord
from vispress.runtime.forward.rehearsal import rehearsing
from vispress.runtime.graphs.arguments import Arguments
from vispress.runtime.graphs.backends import Backend, record
from vispress.runtime.graphs.copies import Copies
from vispress.runtime.graphs.watch import Watch
from vispress.runtime.kv_cache.hf_compat import CACHE


@dataclass(frozen=True, eq=False)
class Site:
    """The model that is captured.

    Args:
        owner: The head, or the base model where there is none.
        adapter: Knows the model.
        original: The owner's forward.
        backend: How it is recorded.
        weights: Its parameters.
    """

    owner: nn.Module
    adapter: ModelAdapter
    original: Callable[..., Any]
    backend: Backend
    weights: Sequence[Tensor]

    @cached_property
    def windows(self) -> tuple[object, ...]:
        """What keeps decoder layers from seeing all tokens in one way; empty for nothing."""
        config, kinds = self.adapter.language_model.config, self.adapter.layer_types
        found = [window for kind in kinds if (window := window_of(config, kind)) is not None]
        return tuple(found) if len({*kinds}) == 1 else tuple(kinds)

    @property
    def attachment(self) -> Attachment | None:
        """What compresses the model now, if something does."""
        found: Attachment | None = self.adapter.base.__dict__.get(ATTRIBUTE)
        return found

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.weights[0].device


class PrefillGraph:
    """A recorded prefill.

    Args:
        site: The model.
        given: Arguments of one call.
        special: Token ids that belong to the layout.
        cache: An empty cache like those that calls bring; None where they bring none.

    Raises:
        NotFixedError: It is no fixed sequence of operations.
    """

    def __init__(
        self, site: Site, given: Arguments, special: Sequence[int], cache: Cache | None
    ) -> None:
        self._site, self._rows = site, given.ids.shape
        with torch.inference_mode(False):
            self._inputs = {name: one.clone() for name, one in given.tensors.items()}
            host = {name: one.clone() for name, one in given.host.items()}
        self._written = ("input_ids", *given.values)
        self._held: Cache | None = None
        values = [self._inputs[name] for name in given.values]
        ids = [self._inputs["input_ids"], host["input_ids"]]
        empty = None if cache is None else _emptied(cache, site.device)

        def watch(answers: Watch | None) -> Watch:
            return Watch([*site.weights, *values], ids, special, answers=answers)

        def run() -> Any:
            self._held = None if empty is None else _emptied(empty, site.device)
            more = {} if self._held is None else {CACHE: self._held}
            return site.original(**self._inputs, **given.plain, **more)

        before = _tensors_of(site.owner)
        try:
            with rehearsing(), knowing([(self._inputs[name], host[name]) for name in host]):
                self._recorded, self._result, self._keeps = record(site.backend, run, watch)
        finally:
            after = _tensors_of(site.owner)
            for (module, name), tensor in before.items():
                setattr(module, name, tensor)
        self._left = [(*at, one) for at, one in after.items() if before.get(at) is not one]
        self._record: PrefillRecord | None = None
        if site.attachment is not None and brings_images(given.tensors):
            self._record = site.attachment.turns.last()[1]

    def replay(self, given: Arguments, cache: Cache | None) -> tuple[Any, PrefillRecord | None]:
        """Run it on other values.

        Args:
            given: Arguments of the same layout.
            cache: The call's cache, which is filled.

        Returns:
            What the forward gives, and a record of it where something was compressed.
        """
        tensors = given.tensors
        for name in self._written:
            self._inputs[name].copy_(tensors[name])
        self._recorded.replay()
        copies = Copies(self._site.device)
        if cache is not None and self._held is not None:
            copies.cache(self._held, cache)
        out, record = copies.of(self._result), copies.of(self._record)
        for module, name, tensor in self._left:
            setattr(module, name, copies.of(tensor))
        return out, record

    def close(self) -> None:
        """Let go of nothing: a prefill holds no call's state."""


def _emptied(cache: Cache, device: torch.device) -> Cache:
    """Make a cache like one in which nothing was ever stored."""
    made = copy(cache)
    made.layers = [copy(layer) for layer in cache.layers]
    for layer in made.layers:
        if isinstance(layer, StaticLayer):  # it would be sent to the device at the first update
            layer.cumulative_length = torch.zeros((), dtype=torch.long, device=device)
    return made


def _tensors_of(model: nn.Module) -> Mapping[tuple[nn.Module, str], Tensor]:
    """Plain tensors that modules carry beside their parameters: some forwards leave one there."""
    return {
        (module, name): value
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    }
