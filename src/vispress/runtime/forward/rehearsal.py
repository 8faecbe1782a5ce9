"""What a call is told by its context, for who runs it ahead, or in place of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from vispress.prompts import current_lengths
from vispress.runtime.forward.owner import GENERATING, LABELS, OWNER_CALL


def told_lengths() -> tuple[tuple[int, ...] | None, ...]:
    """Give the prompt lengths that calls in this context would be told, hashable."""
    generating = GENERATING.get()
    owner = OWNER_CALL.get()
    found = (
        current_lengths(),
        None if generating is None else generating.prompt_lengths,
        None if owner is None else owner.prompt_lengths,
    )
    return tuple(None if one is None else tuple(one.tolist()) for one in found)


def is_supervised() -> bool:
    """Tell whether something outside of the head has labels of its calls."""
    return LABELS.get() is not None


@contextmanager
def rehearsing(*, whole: bool = False) -> Iterator[None]:
    """Inside, calls of a base model do not count as those of the `generate` under way.

    Args:
        whole: Its prompts are not told apart from what stands behind them.
    """
    before = GENERATING.get()
    try:
        more: dict[str, Any] = {"prompt_lengths": None} if whole else {}
        GENERATING.set(None if before is None else replace(before, **more))
        yield
    finally:
        GENERATING.set(before)
