"""Stand in front of a model's forward, and answer calls from graphs where there are any."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from threading import RLock
from typing import Any, Final

import torch
from torch import nn

from vispress.adapters.base import ModelAdapter
from vispress.runtime.forward.model_call import brings_images, by_name
from vispress.runtime.forward.owner import amid_turn
from vispress.runtime.graphs.arguments import MASK, Arguments, kind_of
from vispress.runtime.graphs.backends import Backend
from vispress.runtime.graphs.counts import CaptureReport
from vispress.runtime.graphs.lengths import Fitted
from vispress.runtime.graphs.lodging import lodging_of, why_no_lodging
from vispress.runtime.graphs.prefill import PrefillGraph
from vispress.runtime.graphs.reasons import (
    has_features,
    why_no_key,
    why_no_prefill,
    why_no_text,
    why_not,
)
from vispress.runtime.graphs.site import Site
from vispress.runtime.graphs.steps import Guest, Step, StepGraph
from vispress.runtime.graphs.watch import NotFixedError
from vispress.runtime.hooks.instance_patch import Original, forget, patch_instance, undo_all
from vispress.runtime.kv_cache.cache_layers import is_compressed
from vispress.runtime.kv_cache.hf_compat import cache_of

CAPTURED: Final = "_vispress_captured"
"""Attribute of a base model: what captures it."""
_REFUSALS: Final = 256
"""Layouts of which it is remembered why they have no graph."""


class Captured:
    """What captures one model; see `vispress.capture`.

    Args:
        owner: The head, or the base model where there is none.
        adapter: Knows the model.
        backend: How graphs are recorded.
        max_graphs: Graphs that are held.
        bucket: Tokens that growing caches are rounded up to a multiple of.
        prompt_bucket: Likewise prompts.
    """

    def __init__(
        self,
        owner: nn.Module,
        adapter: ModelAdapter,
        backend: Backend,
        max_graphs: int,
        bucket: int,
        prompt_bucket: int,
    ) -> None:
        self._lock, self._undo = RLock(), list[Callable[[], None]]()
        self._max, self._bucket, self._prompt_bucket = max_graphs, bucket, prompt_bucket
        original = Original(owner, "forward", owner.__dict__.get("forward"))
        self._site = Site(owner, adapter, original, backend, list(owner.parameters()))
        self._addresses = self._where()
        self._graphs: OrderedDict[Hashable, Any] = OrderedDict()
        self._refused: OrderedDict[Hashable, str] = OrderedDict()
        self._counts: Counter[str] = Counter()
        self._fallbacks: Counter[str] = Counter()
        self._exact: Counter[str] = Counter()

    def __reduce__(self) -> Any:
        return _released, ()  # a copy of the model is not captured

    @property
    def active(self) -> bool:
        """Whether it stands in front of a model."""
        return bool(self._undo)

    def attach(self) -> None:
        """Stand in front of the owner's forward."""
        owner, base = self._site.owner, self._site.adapter.base
        base.__dict__[CAPTURED] = self
        self._undo.append(lambda: forget(base, CAPTURED))
        self._undo.append(patch_instance(owner, "forward", self._runs, outer=True))
        if hasattr(owner, "_supports_mm_encoder_outputs"):
            # `generate` would run the encoder ahead of the forward, where it is in no graph
            name = "_supports_mm_encoder_outputs"
            self._undo.append(patch_instance(owner, name, _encodes_inside, outer=True))

    def remove(self) -> None:
        """Let the model run as before, and let go of all graphs."""
        with self._lock:
            undo_all(self._undo)
            self.drop()

    def __enter__(self) -> "Captured":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def report(self) -> CaptureReport:
        """Tell what has run from graphs, and what has not and why."""
        with self._lock:
            counts = self._counts
            return CaptureReport(
                len(self._graphs),
                counts["recorded"],
                counts["evicted"],
                counts["prefills"],
                counts["steps"],
                dict(self._fallbacks),
                dict(self._exact),
            )

    @property
    def fallbacks(self) -> Mapping[str, int]:
        """Calls that ran as they would have, by the reason."""
        return self.report().fallbacks

    # --- calls

    def _runs(self, original: Original, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not self.active:
            return original(*args, **kwargs)
        with self._lock:
            owner = self._site.owner
            given = by_name(type(owner).forward, (owner, *args), kwargs)
            given.pop("self")
            with self._site.backend.turn():
                answer = self._answer(given)
            if not isinstance(answer, str):
                return answer[0]
            self._fallbacks[answer] += 1
            if (lodging := lodging_of(cache_of(given))) is not None:
                lodging.leave()
        return original(*args, **kwargs)

    def _answer(self, given: dict[str, Any]) -> tuple[Any] | str:
        """Give what a call gives, from a graph; or say why there is none."""
        site, cache = self._site, cache_of(given)
        if (now := self._where()) != self._addresses:  # weights were moved or exchanged
            self.drop()
            self._addresses = now
        why = why_not(site.owner, site.weights, given)
        if why is not None:
            return why
        steps = given["input_ids"].shape[1] == 1 and not brings_images(given)
        if steps:
            why = self._why_no_step(given, cache)
        else:
            why = why_no_prefill(given, cache)
            why = why or self._why_no_plan(given)
        if why is not None:
            return why
        if given.get("mm_encoder_outputs") is not None:
            given["mm_encoder_outputs"] = None  # an empty one, to be filled
        return self._step(given, cache) if steps else self._prefill(given, cache)

    def _why_no_plan(self, given: Mapping[str, Any]) -> str | None:
        """Say why the methods that compress the model have no fixed sequence."""
        attachment = self._site.attachment
        if attachment is None or not brings_images(given):  # no method touches a text
            return None if attachment is None else why_no_text(self._site.adapter.base)
        for method in attachment.methods:
            if why := method.uncapturable():
                return f"{method.name}: {why}"
        return None

    def _prefill(self, given: Mapping[str, Any], cache: Any) -> tuple[Any] | str:
        arguments, attachment = Arguments.of(given), self._site.attachment
        if why := why_no_key(arguments.plain):
            return why
        fitted = Fitted.of(self._site, arguments, cache, self._prompt_bucket)
        key = (
            "prefill",
            None if attachment is None else attachment.plan,
            fitted.key,
            kind_of(cache),
        )
        made = partial(PrefillGraph, self._site, fitted, cache)
        graph = self._graph(key, made)
        if isinstance(graph, str):
            return graph
        out, record = graph.replay(fitted, cache)
        self._counts["prefills"] += 1
        if fitted.why is not None:
            self._exact[fitted.why] += 1
        if attachment is not None:
            held = cache if cache is not None else cache_of(out) if isinstance(out, dict) else None
            base, length = self._site.adapter.base, fitted.length
            if record is None:
                attachment.turns.note_text(base, length, held, fresh=cache is None)
            else:
                attachment.turns.note_again(base, record, length, held)
        return (out,)

    def _why_no_step(self, given: Mapping[str, Any], cache: Any) -> str | None:
        """Say why a call of one token is no step that can be recorded."""
        site, attachment = self._site, self._site.attachment
        if any(site.windows):
            return "layers have windows of attention, or attention of several kinds"
        if attachment is not None and attachment.plan.remembering.methods:
            return f"{attachment.plan.remembering.methods[0].name} chooses at each step"
        if why := why_no_lodging(cache):
            return why
        if has_features(given) or isinstance(given.get(MASK), dict):
            return "attention_mask is a dictionary of masks, or features are given"
        if given.get("position_ids") is None and hasattr(site.adapter.base, "rope_deltas"):
            return "position_ids are missing, and the model makes them of what it saw last"
        if attachment is None:
            return (
                "its KV cache is compressed, and the model is not" if is_compressed(cache) else None
            )
        if not amid_turn(site.adapter.base):
            return "it begins a turn"
        return None

    def _step(self, given: Mapping[str, Any], cache: Any) -> tuple[Any] | str:
        site, attachment, step = self._site, self._site.attachment, Step.of(given)
        if why := why_no_key(step.plain):
            return why
        config: Any = site.adapter.language_model.config
        plan = None if attachment is None else attachment.plan
        like = ("step", plan, config._attn_implementation, step.key())
        lodging, guest = lodging_of(cache), None
        if lodging is None or lodging.home.key[: len(like)] != like or not lodging.takes(step.mask):
            if lodging is not None:
                lodging.leave()
            if why := why_no_lodging(cache):
                return why
            guest = Guest.of(cache, self._bucket)
            if why := guest.why_not(step, cache, config._attn_implementation):
                return why
            key = (*like, guest.rooms, guest.capacity)
            graph = self._graph(key, partial(StepGraph, site, step, guest, self._lock, key))
            if isinstance(graph, str):
                return graph
        else:
            graph = lodging.home
            self._graphs.move_to_end(graph.key)
        out = graph.replay(step, cache, guest)
        self._counts["steps"] += 1
        return (out,)

    # --- graphs

    def _graph(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Find a graph or record it; or say why there can be none."""
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        if key in self._refused:
            return self._refused[key]
        while len(self._graphs) >= self._max:
            self._graphs.popitem(last=False)[1].close()
            self._counts["evicted"] += 1
        try:
            graph = self._graphs[key] = make()
        except NotFixedError as error:
            why = str(error)
        except torch.cuda.OutOfMemoryError as error:
            self.drop()  # what runs without a graph may need what they hold
            why = f"recording failed: {error}"
        except Exception as error:  # whatever it was: the same call, run as it is, says it again
            why = f"recording failed: {type(error).__name__}: {error}"
        else:
            self._counts["recorded"] += 1
            return graph
        self._refused[key] = why
        while len(self._refused) > _REFUSALS:
            self._refused.popitem(last=False)
        return why

    def _where(self) -> tuple[int, ...]:
        return tuple(map(torch.Tensor.data_ptr, self._site.weights))

    def drop(self) -> None:
        """Let go of all graphs, and forget what had none: calls are recorded anew."""
        with self._lock:
            for graph in self._graphs.values():
                graph.close()
            self._graphs.clear()
            self._refused.clear()


def _released() -> Captured:
    """Make one that lets all calls through."""
    made = object.__new__(Captured)
    made._lock, made._undo, made._graphs = RLock(), [], OrderedDict()
    made._refused, made._counts, made._fallbacks = OrderedDict(), Counter(), Counter()
    made._exact = Counter()
    return made


def _encodes_inside(original: Original) -> bool:
    return False
