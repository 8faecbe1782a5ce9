"""Measure how far a decoder layer's attention and its MLP move their rows: hooks of two modules."""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vispress.methods.base import upcast
from vispress.precision import full_precision
from vispress.runtime.forward.attention_reads import TransitionMeasure
from vispress.runtime.forward.running import MEASURED, RUNNING, Running
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.hooks.compiling import outside
from vispress_kernels.transition_scores import transition_scores

ROWS = 1024
"""Rows of a sample whose movement is measured at a time."""


def measure_layer(layer: Any, number: int) -> list[Callable[[], None]]:
    """Put hooks on a decoder layer's attention and MLP; gives what undoes them."""
    attention, mlp = partial(_attention_ran, number), partial(_mlp_ran, number)
    return [
        layer.self_attn.register_forward_hook(attention, with_kwargs=True).remove,
        layer.mlp.register_forward_hook(mlp, with_kwargs=True).remove,
    ]


@torch.no_grad()
def _attention_ran(number: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    running = kwargs.get(RUNNING)
    if isinstance(running, Running) and running.state.mode == "run":
        MEASURED.set(weakref.ref(running))
        _note(running.state, number, 0, args, kwargs, output)


@torch.no_grad()
def _mlp_ran(number: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        _MOVED_OUTSIDE(number, args, kwargs, output)
    else:
        _moved(number, args, kwargs, output)


def _moved(number: int, args: Any, kwargs: Any, output: Any) -> None:
    measured = MEASURED.get()
    if measured is None:
        return
    MEASURED.set(None)
    if (running := measured()) is not None:
        _note(running.state, number, 1, args, kwargs, output)


_MOVED_OUTSIDE = outside(_moved)


@torch.no_grad()
def measure_update(state: ForwardState, hidden: Tensor) -> None:
    """Note how far the decoder layer that has just run moved its rows, `[B, P, D]` behind it."""
    assert state.entered is not None
    rows, before = state.entered
    state.update, state.entered = (rows, update_norms(before.to(hidden.device), hidden)), None


def update_norms(before: Tensor, behind: Tensor) -> Tensor:
    """`[B, P]` fp32: L2 norm of what each row `[B, P, D]` gained.

    Differences are in fp32: what a layer adds is small beside what it is added to.
    """
    parts = zip(torch.split(before, ROWS, dim=1), torch.split(behind, ROWS, dim=1), strict=True)
    norms = [torch.linalg.vector_norm(upcast(y) - upcast(x), dim=2) for x, y in parts]
    return torch.cat(norms, dim=1).float()


def _note(state: ForwardState, number: int, part: int, args: Any, kwargs: Any, output: Any) -> None:
    """Note how far a module (0 attention, 1 MLP) moved its rows."""
    x: Tensor = args[0] if args else kwargs["hidden_states"]
    y: Tensor = output[0] if isinstance(output, tuple) else output
    x, y = x.detach(), y.detach()
    if x.dtype != y.dtype:  # autocast changes it on the way
        dtype = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(dtype), y.to(dtype)
    with full_precision():
        found = transition_scores(x, y, backend=state.plan.backend)
    if part == 0:
        state.transitions[number] = TransitionMeasure(state.rows_at(number), [found])
    else:
        state.transitions[number].found.append(found)
