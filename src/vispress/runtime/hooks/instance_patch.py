"""Shadow a bound method on one instance, never on its class; undone without a trace."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


class Original:
    """A bound method found again through its module, so that copies of the model keep working."""

    def __init__(self, module: nn.Module, name: str, previous: Any) -> None:
        self.module, self.name, self.previous = module, name, previous

    @property
    def function(self) -> Callable[..., Any]:
        """What the instance had before: its own shadow, or the class's method."""
        if self.previous is not None:
            return self.previous  # type: ignore[no-any-return]
        return getattr(type(self.module), self.name).__get__(self.module)  # type: ignore[no-any-return]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class InstancePatch:
    """Stands on an instance in place of a bound method; shows that method's signature."""

    def __init__(self, wrapper: Callable[..., Any], original: Original) -> None:
        self.wrapper, self.original = wrapper, original

    @property
    def __signature__(self) -> inspect.Signature:
        # generate() passes only the arguments it finds here
        return inspect.signature(self.original.function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapper(self.original, *args, **kwargs)


def patch_instance(module: nn.Module, name: str, wrapper: Callable[..., Any]) -> Callable[[], None]:
    """Let `wrapper(original, *args, **kwargs)` answer calls of `module.name`; returns the undo."""
    previous = module.__dict__.get(name)
    module.__dict__[name] = InstancePatch(wrapper, Original(module, name, previous))
    return partial(_restore, module, name, previous)


def forget(module: nn.Module, name: str) -> None:
    """Remove an attribute of the instance (a function, so that deep copies follow the module)."""
    del module.__dict__[name]


def _restore(module: nn.Module, name: str, previous: Any) -> None:
    if previous is None:
        del module.__dict__[name]
    else:
        module.__dict__[name] = previous
