"""Keep what compression decides on the host out of the graphs that `torch.compile` traces."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

REASON = (
    "vispress finds pictures and chooses tokens on the host, between graphs: compile with "
    "fullgraph=False, or each decoder layer by itself (layer.compile())"
)
"""What torch says to who asks for one graph of all."""
Function = TypeVar("Function", bound=Callable[..., Any])


def outside(function: Function) -> Function:
    """Let a function, and all that it calls, run between graphs wherever one is being traced."""
    apart: Any = torch.compiler.disable(function, reason=REASON)  # type: ignore[no-untyped-call]

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return (apart if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return cast(Function, run)


def between(function: Function) -> Function:
    """Let a function run between graphs, and what it calls be traced by itself.

    For what runs the model's own code somewhere in the midst of choices on the host.
    """
    apart: Any = torch.compiler.disable(function, recursive=False, reason=REASON)  # type: ignore[no-untyped-call]
    return cast(Function, apart)
