"""Shadow a bound method on one instance, never on its class; undone without a trace."""

import inspect
from collections.abc import Callable
from functools import partial
from types import CodeType
from typing import Any

from torch import nn

from vispress.errors import CompressionStateError


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
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        # not by a bound method: dynamo would look it up on the instance again, and find the patch
        return getattr(type(self.module), self.name)(self.module, *args, **kwargs)


class InstancePatch:
    """Stands on an instance in place of a bound method; shows that method's signature.

    Args:
        wrapper: Answers calls, with `original` in front of their arguments; None: `original` does.
        original: The method.
        keyword: A keyword that the wrapper takes out, shown in the signature too: trainers leave
            out what they do not find there.
        outer: Whether it only stands in front, so that what was there still answers beneath it.
    """

    def __init__(
        self,
        wrapper: Callable[..., Any] | None,
        original: Original,
        keyword: str | None = None,
        *,
        outer: bool = False,
    ) -> None:
        self.wrapper, self.original, self.keyword = wrapper, original, keyword
        self.outer = outer

    @property
    def __signature__(self) -> inspect.Signature:
        # generate() passes only the arguments it finds here
        signature = inspect.signature(self.original.function)
        if self.keyword is None or self.wrapper is None or self.keyword in signature.parameters:
            return signature
        kind = inspect.Parameter.KEYWORD_ONLY
        more = inspect.Parameter(self.keyword, kind, default=None)
        known = list(signature.parameters.values())
        end = len(known) - (bool(known) and known[-1].kind is inspect.Parameter.VAR_KEYWORD)
        return signature.replace(parameters=[*known[:end], more, *known[end:]])

    @property
    def __code__(self) -> CodeType:
        # torch.export names the places of a forward by it, and then is refused by what we say
        return self.original.function.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.wrapper is None:
            return self.original(*args, **kwargs)
        return self.wrapper(self.original, *args, **kwargs)


def patch_instance(
    module: nn.Module,
    name: str,
    wrapper: Callable[..., Any],
    *,
    keyword: str | None = None,
    outer: bool = False,
) -> Callable[[], None]:
    """Let `wrapper(original, *args, **kwargs)` answer calls of `module.name`; returns the undo.

    Args:
        module: The instance.
        name: Of its method.
        wrapper: What answers.
        keyword: See `InstancePatch`.
        outer: See `InstancePatch`.
    """
    original = Original(module, name, module.__dict__.get(name))
    patch = InstancePatch(wrapper, original, keyword, outer=outer)
    module.__dict__[name] = patch
    return partial(restore, patch)


def is_patched(module: nn.Module, name: str) -> bool:
    """Whether a patch still answers calls of `module.name`, wrapped or not."""
    found = module.__dict__.get(name)
    while found is not None:
        patch = isinstance(found, InstancePatch)
        if patch and found.wrapper is not None and not found.outer:
            return True
        found = found.original.previous if patch else getattr(found, "__wrapped__", None)
    return False


def refuse_replaced(*modules: nn.Module | None) -> None:
    """Refuse modules whose `forward` was patched, and replaced since.

    Raises:
        CompressionStateError: Says what would work.
    """
    for module in modules:
        if module is not None and not is_patched(module, "forward"):
            raise CompressionStateError(
                f"{type(module).__name__}.forward was replaced after compress_model, which no "
                "longer sees what it is called with; call remove_compression(model), then "
                "compress_model behind whatever replaces it (TRL's trainers do: compress their "
                ".model, or give them a CompressionCallback, which sees to it as training begins)"
            )


def forget(module: nn.Module, name: str) -> None:
    """Remove an attribute of the instance (a function, so that deep copies follow the module)."""
    module.__dict__.pop(name, None)


def undo_all(hooks: list[Callable[[], None]]) -> None:
    """Undo in reverse order; what is interrupted can be done again."""
    while hooks:
        hooks[-1]()
        hooks.pop()


def restore(patch: InstancePatch) -> None:
    """Take a patch off; whoever wrapped it since reaches the original through it."""
    module, name = patch.original.module, patch.original.name
    patch.wrapper = None
    if module.__dict__.get(name) is not patch:
        return
    if patch.original.previous is None:
        del module.__dict__[name]
    else:
        module.__dict__[name] = patch.original.previous
