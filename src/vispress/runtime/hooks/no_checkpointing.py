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
        self._running = 0
        self._off: list[nn.Module] = []

    @contextmanager
    def __call__(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        with _LOCK:
            self._running += 1
            if self._running == 1:
                self._off = [x for x in layers if getattr(x, "gradient_checkpointing", False)]
                for layer in self._off:
                    layer.gradient_checkpointing = False  # type: ignore[assignment]
        try:
            yield
        finally:
            with _LOCK:
                self._running -= 1
                if self._running == 0:
                    for layer in self._off:
                        layer.gradient_checkpointing = True  # type: ignore[assignment]
                    self._off = []
