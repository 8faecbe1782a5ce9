"""Collect what plans add to a training loss, for the length of a block."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from vispress.types import TokenPlan

COLLECTING: ContextVar[tuple["Collected", ...]] = ContextVar("vispress_collecting", default=())
"""What collects losses in this context; set back when its block ends."""


class Collected:
    """Losses of the plans that were made for one model, by name.

    Args:
        base: Its base model.
    """

    def __init__(self, base: Any) -> None:
        self.base = base
        self.by_name: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Add to a sum; layers may lie on several devices, the first one's is taken."""
        before = self.by_name.get(name)
        self.by_name[name] = value if before is None else before + value.to(before.device)

    def total(self) -> Tensor | None:
        """The sum over names, or None where nothing came."""
        values = list(self.by_name.values())
        return None if not values else torch.stack([v.to(values[0].device) for v in values]).sum()


@contextmanager
def collecting(base: Any) -> Iterator[Collected]:
    """Collect the losses of calls of a base model inside the block (this context only)."""
    collected = Collected(base)
    token = COLLECTING.set((*COLLECTING.get(), collected))
    try:
        yield collected
    finally:
        COLLECTING.reset(token)


def collect(base: Any, plan: TokenPlan, images: int) -> None:
    """Note the losses of a plan, if anything collects them.

    Args:
        base: The base model of the call.
        plan: Made once, outside of checkpoints: nothing is counted twice.
        images: Of the whole call, over which losses are a mean, however they fall into buckets.
    """
    for collected in COLLECTING.get():
        if collected.base is base:
            for name, values in plan.losses.items():
                collected.add(name, values.sum() / images)
