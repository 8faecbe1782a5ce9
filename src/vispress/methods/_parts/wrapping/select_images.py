"""Some of the images of a bucket."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from vispress.devices import sent
from vispress.types import Memory, Transition, VisualTokens

_SHARED = ("crops", "two_layer", "projector", "final_norm")
"""What is the same for all images of a bucket, though it holds tensors."""


def select_images(tokens: VisualTokens, rows: Sequence[int]) -> VisualTokens:
    """The bucket of the images at `rows`, each in `[0, B)`, in that order."""

    def pick(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[sent(torch.tensor(rows), value.device)]
        if isinstance(value, tuple) and value and isinstance(value[0], Memory):
            return tuple(value[row] for row in rows)
        if isinstance(value, tuple):
            return tuple(map(pick, value))
        if isinstance(value, Transition | VisualTokens):
            own = {f.name: getattr(value, f.name) for f in fields(value) if f.name not in _SHARED}
            return replace(value, **{name: pick(held) for name, held in own.items()})
        return value

    picked: VisualTokens = pick(tokens)
    return picked
