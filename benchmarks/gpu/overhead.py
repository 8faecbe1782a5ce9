"""What choosing tokens costs a prefill: the time inside vispress's own hooks, and inside `plan`."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch

from vispress import compress_model, remove_compression
from vispress.methods.base import Compressor
from vispress.runtime.encoder.capture import EncoderCapture, EncoderSink
from vispress.runtime.forward import measuring, prefill
from vispress.runtime.forward.state import ForwardState
from vispress.types import TokenPlan, VisualTokens

HOOKS: tuple[tuple[Any, str], ...] = (
    (prefill, "begin"),
    (prefill, "enter_layer"),
    (prefill, "leave_layer"),
    (measuring, "_note"),
    (prefill, "finish"),
    (EncoderSink, "observe"),
    (ForwardState, "observe"),
    (EncoderCapture, "__init__"),
)
"""Everything that a compressed prefill runs beside the model: signals, choice, gather, expand."""


class Meter:
    """Seconds inside watched functions; calls inside calls count once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, metered."""

        @wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            if self._depth:
                return function(*args, **kwargs)
            self._depth += 1
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start
                self._depth -= 1

        return metered

    def take(self) -> float:
        """Milliseconds since the last time this was asked."""
        taken, self.seconds = 1e3 * self.seconds, 0.0
        return taken


@contextmanager
def metered_hooks(meter: Meter) -> Iterator[None]:
    """Inside, the meter sees every hook of `HOOKS`."""
    with ExitStack() as stack:
        for owner, name in HOOKS:
            stack.enter_context(patch.object(owner, name, meter.wrap(getattr(owner, name))))
        yield


def metered_plan(method: Compressor, meter: Meter) -> Compressor:
    """A compressor that behaves the same and has its `plan` metered."""

    class Metered(type(method)):  # type: ignore[misc]
        def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
            plan: TokenPlan = meter.wrap(super().plan)(tokens, num_keep)
            return plan

    Metered.__name__ = type(method).__name__
    twin = object.__new__(Metered)
    twin.__dict__.update(method.__dict__)
    return twin


@torch.inference_mode()
def _prefill_ms(model: Any, inputs: Mapping[str, Any]) -> float:
    start = time.perf_counter()
    model(**inputs, use_cache=True, logits_to_keep=1)
    return 1e3 * (time.perf_counter() - start)


def warm_up(model: Any, inputs: Mapping[str, Any], method: Compressor) -> None:
    """One compressed prefill, so that what is made once is not timed."""
    compress_model(model, method)
    try:
        _prefill_ms(model, inputs)
    finally:
        remove_compression(model)


def one_round(
    model: Any, inputs: Mapping[str, Any], method: Compressor, control: Compressor
) -> dict[str, float]:
    """Milliseconds, once: uncompressed, compressed, the control, and where the time went.

    Args:
        model: Uncompressed, on a CPU.
        inputs: A batch with images.
        method: What is measured.
        control: One of the same budget that reads nothing (`random`).
    """
    hooks, plans = Meter(), Meter()
    found = {"uncompressed": _prefill_ms(model, inputs)}
    for name, one in (("compressed", metered_plan(method, plans)), ("control", control)):
        compress_model(model, one)
        try:
            with metered_hooks(hooks):
                found[name] = _prefill_ms(model, inputs)
        finally:
            remove_compression(model)
        if name == "compressed":
            found["hooks"], found["plan"] = hooks.take(), plans.take()
    return found
