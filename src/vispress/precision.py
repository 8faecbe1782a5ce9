"""Leave `torch.autocast` alone where the model computes, and switch it off where we score.

A score of two neighbours differs by less than bf16 resolves, so that which tokens are kept would
depend on whether training runs under autocast. The model's own modules, even where vispress calls
them, compute as the model does.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Final

import torch

_ACCELERATOR: Final = torch.accelerator.current_accelerator(check_available=False)
_TYPES: Final = ("cpu",) if _ACCELERATOR is None else ("cpu", _ACCELERATOR.type)
"""Device types with tensors of ours; on the host there are some beside any accelerator's."""


def full_precision() -> AbstractContextManager[None]:
    """Compute inside in the dtype of the tensors, whatever autocast is on outside.

    Free where none is: then nothing is entered.
    """
    if not torch.is_autocast_enabled("cpu") and not (
        _ACCELERATOR is not None and torch.is_autocast_enabled(_ACCELERATOR.type)
    ):
        return nullcontext()
    return _off([kind for kind in _TYPES if torch.is_autocast_enabled(kind)])


@contextmanager
def _off(kinds: list[str]) -> Iterator[None]:
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield
