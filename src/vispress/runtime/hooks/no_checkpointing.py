"""Layers that run without gradient checkpointing for the length of a call."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

_LOCK = threading.Lock()


class NoCheckpointing:
    """Switches gradient checkpointing of some layers off while at least one call runs.

    A checkpoint would run its layer again in the backward pass, without the state of the call.
    """

    def __init__(self) -> None:
        self._running: set[object] = set()
        self._off: list[nn.Module] = []

    @contextmanager
    def __call__(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        call = object()
        # calls are named, not counted, and entered inside `try`: so an interrupt at any point
        # leaves nothing running
        try:
            with _LOCK:
                if not self._running:
                    self._off += [x for x in layers if getattr(x, "gradient_checkpointing", False)]
                self._running.add(call)
                for layer in self._off:
                    layer.gradient_checkpointing = False  # type: ignore[assignment]
            yield
        finally:
            with _LOCK:
                self._running.discard(call)
                if not self._running:
                    for layer in self._off:
                        layer.gradient_checkpointing = True  # type: ignore[assignment]
                    self._off = []
