"""Let a stage compute the MLP of a decoder layer: a hook of its attention, a patch of its MLP."""

import weakref
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import nn

from vispress.runtime.forward.handover import Handover
from vispress.runtime.forward.running import RUNNING, Running
from vispress.runtime.hooks.compiling import outside
from vispress.runtime.hooks.instance_patch import Original, patch_instance

FED: ContextVar["tuple[int, weakref.ref[Running]] | None"] = ContextVar(
    "vispress_fed", default=None
)
"""The layer whose MLP a stage is to compute, if its attention ran last in this context, and the
call."""


def feed_layer(layer: Any, number: int) -> list[Callable[[], None]]:
    """Put a hook on a decoder layer's attention and a patch on its MLP; gives what undoes them."""
    handover = Handover(number)
    ran = partial(_attention_ran, handover)
    return [
        layer.self_attn.register_forward_hook(ran, with_kwargs=True).remove,
        patch_instance(layer.mlp, "forward", partial(_mlp_runs, handover)),
    ]


def _attention_ran(
    handover: Handover, module: nn.Module, args: Any, kwargs: Any, output: Any
) -> None:
    running = kwargs.get(RUNNING)
    feeds = isinstance(running, Running) and running.feed_forward is not None
    handover.note(FED, running if feeds else None)


def _mlp_runs(handover: Handover, original: Original, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        if not handover.waiting:  # as in a decode step, whose graph stays whole
            return original(*args, **kwargs)
        return _FEEDS_OUTSIDE(handover, original, args, kwargs)
    return _feeds(handover, original, args, kwargs)


def _feeds(
    handover: Handover, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    running = handover.peek(FED)
    if running is None or running.feed_forward is None:
        return original(*args, **kwargs)
    handover.end(FED)
    (hidden,) = (*args, *kwargs.values())
    return running.feed_forward(handover.number, original.module, original, hidden)


_FEEDS_OUTSIDE = outside(_feeds)
