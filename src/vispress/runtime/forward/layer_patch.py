"""Stand in front of a decoder layer's forward: where rows go, and what its keywords become."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from vispress.runtime.forward.dynamic_decode import DynamicDecodeCall
from vispress.runtime.hooks.attention import OBSERVER
from vispress.runtime.hooks.instance_patch import (
    InstancePatch,
    Original,
    refuse_replaced,
    restore,
)

Enter = Callable[
    [nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]
]
"""Gives what a layer is called with, from what it would be."""


class LayerPatch(InstancePatch):
    """Stands on a decoder layer in place of its `forward`.

    A hook would cost ten calls a layer and step, which is most of what a decode step may cost. It
    stands where a hook would: outside of checkpoints that transformers puts around `forward`.

    Args:
        number: Of the layer.
        enter: Changes the arguments of a call under compression.
        original: The forward.
    """

    def __init__(self, number: int, enter: Enter, original: Original) -> None:
        super().__init__(enter, original)
        self.number = number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        original = self.original
        if OBSERVER in kwargs and self.wrapper is not None:
            call = kwargs[OBSERVER]
            if type(call) is DynamicDecodeCall:
                del kwargs[OBSERVER]
                changes = call.by_layer or call.make(kwargs)
                kwargs |= changes[self.number]
                if call.shifts:  # tables of its own, made where the first layer is
                    hidden = args[0] if args else kwargs["hidden_states"]
                    cos, sin = kwargs["position_embeddings"]
                    if cos.device != hidden.device:
                        moved = cos.to(hidden.device), sin.to(hidden.device)
                        kwargs["position_embeddings"] = moved
            else:
                args, kwargs = self.wrapper(original.module, args, kwargs)
                if not args[0].shape[1]:
                    return args[0]  # no row is left of a chunk
        if original.previous is not None:
            return original.previous(*args, **kwargs)
        return type(original.module).forward(original.module, *args, **kwargs)


def refuse_passed_by(layers: Sequence[nn.Module]) -> None:
    """Refuse decoder layers that are no longer entered through their patch; cheap in each call.

    Raises:
        CompressionStateError: Says what would work.
    """
    for layer in layers:
        own = layer.__dict__
        if "forward" in own:  # no calls: a decode step comes here
            patch = own["forward"]
            if patch.__class__ is LayerPatch and patch.wrapper is not None:
                continue
        refuse_replaced(layer)


def patch_layer(module: nn.Module, number: int, enter: Enter) -> Callable[[], None]:
    """Let a decoder layer be entered through `enter`; returns the undo.

    Args:
        module: The layer.
        number: Of the layer.
        enter: Changes the arguments of a call under compression.
    """
    original = Original(module, "forward", module.__dict__.get("forward"))
    patch = LayerPatch(number, enter, original)
    module.__dict__["forward"] = patch
    return partial(restore, patch)
