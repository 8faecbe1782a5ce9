"""Scale what a decoder layer's MLP adds to its rows by a gate: hooks of two modules."""

import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch import nn

from vispress.adapters.decoder import mlp_branch
from vispress.runtime.forward.handover import Handover
from vispress.runtime.forward.running import RUNNING, Running, refuse_reentrant
from vispress.runtime.forward.state import Span
from vispress.runtime.tokens.live_tokens import scale_rows

GATED: ContextVar["tuple[int, weakref.ref[Running]] | None"] = ContextVar(
    "vispress_gated", default=None
)
"""The layer with a gate whose attention ran last in this context, and the call."""


def gate_layer(layer: Any, number: int) -> list[Callable[[], None]]:
    """Put hooks on a decoder layer's attention and MLP; gives what undoes them."""
    hooks, branch = _GateHooks(number), mlp_branch(layer)
    return [
        layer.self_attn.register_forward_hook(hooks.attention_ran, with_kwargs=True).remove,
        branch.register_forward_hook(hooks.branch_ran).remove,
    ]


class _GateHooks:
    """Hooks of one layer.

    Args:
        number: The layer.
    """

    def __init__(self, number: int) -> None:
        self.number, self.handover = number, Handover(number)

    def attention_ran(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Note the call for the MLP, if this layer has a gate in it."""
        running = kwargs.get(RUNNING)
        gated = isinstance(running, Running) and self._span(running) is not None
        self.handover.note(GATED, running if gated else None)

    def branch_ran(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Scale what the MLP adds."""
        running = self.handover.peek(GATED)
        span = None if running is None else self._span(running)
        if running is None or span is None or span.gate is None:
            return None
        self.handover.end(GATED)
        refuse_reentrant(running.state, "the gate")
        if isinstance(output, tuple):
            return (scale_rows(output[0], span.gate, span.rows), *output[1:])
        return scale_rows(output, span.gate, span.rows)

    def _span(self, running: Running) -> Span | None:
        span = running.state.span_at(self.number)
        return None if span is None or span.gate is None else span
