"""Say where prompts end, when an answer or a draft stands behind them in the same forward.

What ranks the visual tokens is the prompt. Labels and `generate` say where it ends; a trainer or a
scorer that gives neither says it here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

import torch
from torch import Tensor

from vispress.errors import ConfigError

PROMPT_LENGTHS: Final = "prompt_lengths"
"""The keyword of a compressed model's call that says the same for that call alone."""
# by context, so that threads and tasks that call models side by side have lengths of their own
_LENGTHS: ContextVar[Tensor | None] = ContextVar("vispress_prompt_lengths", default=None)


@contextmanager
def prompt_lengths(lengths: Tensor | Sequence[int]) -> Iterator[None]:
    """Tell compressed models that run inside the block how long the prompts of their batch are.

    Blocks nest, the innermost counts; a `prompt_lengths` keyword of the model call, or of
    `generate`, counts more.

    Args:
        lengths: `[B]` integers from 1 up: of each sample of the batch, the tokens before its
            answer, visual tokens and those in the KV cache included, padding not. Of packed rows,
            one a document, in their order.

    Raises:
        ConfigError: The lengths are no integers from 1 up. (Their number and their size are
            compared with the batch when a model is called.)
    """
    checked, before = as_lengths(lengths), _LENGTHS.get()
    # set back rather than reset by a token: so it holds wherever an interrupt strikes
    try:
        _LENGTHS.set(checked)
        yield
    finally:
        _LENGTHS.set(before)


def current_lengths() -> Tensor | None:
    """Give the lengths of the innermost `prompt_lengths` block of this context."""
    return _LENGTHS.get()


def as_lengths(lengths: Any) -> Tensor:
    """Make `[B]` int64 on the host of prompt lengths.

    Raises:
        ConfigError: They are not a list of integers from 1 up.
    """
    rule = "one integer from 1 up for each sample (packed: each document)"
    try:
        found = lengths.detach() if isinstance(lengths, Tensor) else torch.as_tensor(lengths)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{PROMPT_LENGTHS} must be {rule}, got {lengths!r}") from error
    whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    if not whole or found.ndim != 1 or not len(found):
        raise ConfigError(
            f"{PROMPT_LENGTHS} must be {rule}, got {tuple(found.shape)} of {found.dtype}"
        )
    found = found.cpu().long()
    if int(found.min()) < 1:
        raise ConfigError(f"{PROMPT_LENGTHS} must be {rule}, got {found.tolist()}")
    return found


def check_ends(lengths: Tensor, available: Sequence[int]) -> None:
    """Refuse a prompt that ends behind its sample.

    Args:
        lengths: `[B]`.
        available: Tokens of each sample, padding left out.

    Raises:
        ConfigError: Names the sample.
    """
    for row, (length, most) in enumerate(zip(lengths.tolist(), available, strict=True)):
        if length > most:
            raise ConfigError(
                f"{PROMPT_LENGTHS}[{row}] is {length}, but sample {row} has {most} tokens; "
                "count tokens without padding, one for each visual token"
            )
