"""Scale what a decoder layer's MLP adds to its rows by a gate: hooks of two modules.

A layer's own hooks lie outside of its checkpoint, those of its modules inside. So the call rides on
to the attention as a keyword of the layer, which a second run is given again, and the attention's
hook notes it for the MLP, which is handed hidden states alone.
"""

import weakref
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import nn

from vispress.adapters.decoder import mlp_branch
from vispress.errors import CompressionStateError
from vispress.runtime.forward.running import RUNNING, Running
from vispress.runtime.tokens.live_tokens import scale_rows

GATED: ContextVar["weakref.ref[Running] | None"] = ContextVar("vispress_gated", default=None)
"""The call whose attention ran last in this context, in a layer with a gate. What an interrupted
call left here is replaced by the next attention, and kept alive by nothing."""


def gate_layer(layer: Any, number: int) -> list[Callable[[], None]]:
    """Put hooks on a decoder layer's attention and MLP; gives what undoes them."""
    branch = mlp_branch(layer)
    return [
        layer.self_attn.register_forward_hook(_attention_ran, with_kwargs=True).remove,
        branch.register_forward_hook(partial(_branch_ran, number)).remove,
    ]


def _attention_ran(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    running = kwargs.get(RUNNING)
    gated = isinstance(running, Running) and running.state.spans
    GATED.set(weakref.ref(running) if gated else None)


def _branch_ran(number: int, module: nn.Module, args: Any, output: Any) -> Any:
    if torch.compiler.is_compiling():
        return None
    noted = GATED.get()
    running = None if noted is None else noted()
    if running is None:
        return None
    GATED.set(None)
    span = running.state.span_at(number)
    if span is None or span.gate is None:
        return None
    if running.trains and not torch.is_grad_enabled():
        raise CompressionStateError(
            "reentrant gradient checkpointing runs a layer without gradients first, and those of "
            "the gate would be lost; use gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
    if isinstance(output, tuple):
        return (scale_rows(output[0], span.gate, span.rows), *output[1:])
    return scale_rows(output, span.gate, span.rows)
