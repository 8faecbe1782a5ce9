"""Record a prefill, from pixels to logits, and run it again for prompts of its layout.

One region holds all of it: encoder, choices, layers and head. For a layout all of that is a fixed
sequence (else it is no prefill that can be recorded), so there is nothing to decide between parts
of it, and a second region would only bring buffers between them.
"""

from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticLayer

from vispress.runtime.forward.model_call import brings_images, knowing
from vispress.runtime.forward.prefill_record import PrefillRecord
from vispress.runtime.forward.rehearsal import rehearsing
from vispress.runtime.graphs.backends import record
from vispress.runtime.graphs.copies import Copies
from vispress.runtime.graphs.lengths import KEEP, Fitted, places_of_logits, shown_without
from vispress.runtime.graphs.site import Site
from vispress.runtime.graphs.watch import Watch
from vispress.runtime.kv_cache.cache_layers import kv_bytes
from vispress.runtime.kv_cache.hf_compat import CACHE, cache_of


class PrefillGraph:
    """A recorded prefill.

    Args:
        site: The model.
        fitted: Arguments of one call.
        cache: An empty cache like those that calls bring; None where they bring none.

    Raises:
        NotFixedError: It is no fixed sequence of operations.
    """

    def __init__(self, site: Site, fitted: Fitted, cache: Cache | None) -> None:
        given, self._site = fitted.given, site
        with torch.inference_mode(False):
            self._inputs = {name: one.clone() for name, one in given.tensors.items()}
            host = {name: one.clone() for name, one in given.host.items()}
            self._places: Tensor | None = None
            if fitted.kept is not None:
                self._places = places_of_logits(fitted.length, fitted.kept, site.device)
        self._written = ("input_ids", *given.values)
        self._held: Cache | None = None
        values = [self._inputs[name] for name in given.values]
        plain = dict(given.plain)
        if self._places is not None:  # of a prompt of any length that fits
            values.append(self._places)
            plain[KEEP] = self._places
        ids = [self._inputs["input_ids"], host["input_ids"]]
        empty = None if cache is None else _emptied(cache, site.device)

        def watch(answers: Watch | None) -> Watch:
            return Watch([*site.weights, *values], ids, site.special, answers=answers)

        def run() -> Any:
            self._held = None if empty is None else _emptied(empty, site.device)
            more = {} if self._held is None else {CACHE: self._held}
            return site.original(**self._inputs, **plain, **more)

        before = _tensors_of(site.owner)
        try:
            copies = [(self._inputs[name], host[name]) for name in host]
            with rehearsing(whole=fitted.behind is not None), knowing(copies):
                self._recorded, self._result, self._keeps = record(site.backend, run, watch)
        finally:
            after = _tensors_of(site.owner)
            for (module, name), tensor in before.items():
                setattr(module, name, tensor)
        self._left = [(*at, one) for at, one in after.items() if before.get(at) is not one]
        self._record: PrefillRecord | None = None
        if site.attachment is not None and brings_images(given.tensors):
            self._record = site.attachment.turns.last()[1]

    def replay(self, fitted: Fitted, cache: Cache | None) -> tuple[Any, PrefillRecord | None]:
        """Run it on other values.

        Args:
            fitted: Arguments of the same layout.
            cache: The call's cache, which is filled.

        Returns:
            What the forward gives, and a record of it where something was compressed.
        """
        tensors, behind = fitted.given.tensors, fitted.behind or 0
        for name in self._written:
            self._inputs[name].copy_(tensors[name])
        if self._places is not None:
            assert fitted.kept is not None
            self._places.copy_(places_of_logits(fitted.length, fitted.kept, self._site.device))
        self._recorded.replay()
        copies = Copies(self._site.device, behind)
        if cache is not None and self._held is not None:
            copies.cache(self._held, cache)
        result = self._result
        if behind and self._places is None:
            result = shown_without(result, behind)
        out, record = copies.of(result), copies.of(self._record)
        if behind and record is not None:
            record.kv_bytes = kv_bytes(cache if cache is not None else cache_of(out))
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
