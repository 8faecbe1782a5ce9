"""Keep what compression decides on the host out of the graphs that `torch.compile` traces.

Whoever is being traced (`torch.compiler.is_compiling()`) calls the twins made here; plain calls go
without them.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from vispress.errors import UnsupportedModelError

REASON = (
    "vispress finds pictures and chooses tokens on the host, between graphs: compile with "
    "fullgraph=False, or each decoder layer by itself (layer.compile()); call "
    "remove_compression(model) before torch.export"
)
"""What torch says to who asks for one graph of all."""
_JIT: Any = torch.jit
is_tracing: Callable[[], bool] = _JIT.is_tracing
"""Whether `torch.jit.trace` runs."""
Function = TypeVar("Function", bound=Callable[..., Any])


def refuse_export() -> None:
    """Refuse `torch.export` of a compressed model.

    Raises:
        UnsupportedModelError: Says what would work.
    """
    if torch.compiler.is_exporting():
        raise UnsupportedModelError(f"torch.export makes one graph of all, and {REASON}")


def refuse_trace() -> None:
    """Refuse `torch.jit.trace` of a compressed model.

    Raises:
        UnsupportedModelError: Says what would work.
    """
    raise UnsupportedModelError(
        "torch.jit.trace keeps what was chosen for one picture for all others: call "
        "remove_compression(model) ahead of it; torch.compile(model.forward) and "
        "vispress.capture(model) run compressed models"
    )


def outside(function: Function) -> Function:
    """Make the twin of a function that runs between graphs, with all that it calls."""
    twin: Any = torch.compiler.disable(function, reason=REASON)  # type: ignore[no-untyped-call]
    return cast(Function, twin)


def between(function: Function) -> Function:
    """Make the twin of a function that runs between graphs, while what it calls is traced.

    For what runs the model's own code somewhere in the midst of choices on the host.
    """
    disable: Any = torch.compiler.disable
    return cast(Function, disable(function, recursive=False, reason=REASON))
