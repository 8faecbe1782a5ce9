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
    """TTV of layers: `|y| / |x|` times the sequence softmax of `1 - cos`, all modules added.

    Args:
        steps: Layers; the runtime gives those that ran on the same rows one tensor of validity.
        direction: `"signed"` or `"abs"` cosine.
    """
    same: dict[int, list[Transition]] = {}
    for step in steps:
        same.setdefault(id(step.sequence_valid), []).append(step)
    groups = list(same.values())
    ordered = [step for group in groups for step in group]
    own = _reading(_joined([step.cosine for step in ordered]), direction)
    scale = _joined([log_sum(group, direction) for group in groups])
    share = (1 - own - scale).exp() * _joined([step.magnitude for step in ordered])
    parts = torch.split(share, [2 * len(group) for group in groups], dim=1)
    sums = [part.sum(dim=1) for part in parts]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(dim=0)


def log_sum(steps: Sequence[Transition], direction: Direction) -> Float[Tensor, "B M 1"]:
    """The softmax's normaliser of each module of layers that ran on the same rows."""
    whole = _reading(_joined([step.sequence_cosine for step in steps]), direction)
    valid = steps[0].sequence_valid[:, None]
    return torch.where(valid, 1 - whole, float("-inf")).logsumexp(dim=-1, keepdim=True)


def _reading(cosine: Tensor, direction: Direction) -> Tensor:
    """The cosine that the direction asks for."""
    return cosine.abs() if direction == "abs" else cosine


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Modules of all parts along the second axis, in at least fp32."""
    wide = [upcast(part) for part in parts]
    return wide[0] if len(wide) == 1 else torch.cat(wide, dim=1)
