"""Token transition variation: how far layers turn and stretch tokens, a part of TransPrune."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vispress.methods.base import upcast
from vispress.types import Transition

Direction = Literal["signed", "abs"]


def summed_variation(steps: Sequence[Transition], direction: Direction) -> Float[Tensor, "B N"]:
    """TTV of several layers, added; those that ran on the same rows are worked on together.

    Args:
        steps: Layers; the runtime gives those with the same rows one tensor of validity.
        direction: `"signed"` or `"abs"` cosine.
    """
    same: dict[int, list[Transition]] = {}
    for step in steps:
        same.setdefault(id(step.sequence_valid), []).append(step)
    return torch.stack([transition_variation(own, direction) for own in same.values()]).sum(dim=0)


def transition_variation(steps: Sequence[Transition], direction: Direction) -> Float[Tensor, "B N"]:
    """TTV of layers: `|y| / |x|` times the sequence softmax of `1 - cos`, all modules added.

    Args:
        steps: Layers that ran on the same rows.
        direction: `"signed"` or `"abs"` cosine.
    """
    magnitude, own, whole = (
        torch.cat([upcast(getattr(step, name)) for step in steps], dim=1)
        for name in ("magnitude", "cosine", "sequence_cosine")
    )
    if direction == "abs":
        whole, own = whole.abs(), own.abs()
    valid = steps[0].sequence_valid
    whole = (1 - whole).masked_fill(~valid[:, None], float("-inf"))
    share = (1 - own - whole.logsumexp(dim=-1, keepdim=True)).exp()
    return (share * magnitude).sum(dim=1)
