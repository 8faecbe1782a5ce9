"""Plans from owners: for each token the kept one that it is folded into, -1 for none.

Owners own themselves. Methods choose them by clusters, by the nearest kept token, by runs of a
video; from there on it is the same.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from vispress.types import TokenPlan


def kept_and_slots(
    owner: Int[Tensor, "B N"], most: int
) -> tuple[Int[Tensor, "B K"], Int[Tensor, "B N"]]:
    """Find the first `most` owners of each row, ascending, and the slot that each token goes to.

    Where a row has fewer owners other tokens fill up behind them.

    Args:
        owner: Of each token, -1 for none.
        most: K.
    """
    survives = owner == torch.arange(owner.shape[1], device=owner.device)
    keep = survives.view(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    slots = (survives.cumsum(dim=1) - 1).gather(1, owner.clamp(min=0)).where(owner >= 0, -1)
    return keep, slots


def ragged(keep: Int[Tensor, "B K"], counts: Sequence[int]) -> Tensor | tuple[Tensor, ...]:
    """Cut rows of kept tokens to their counts; one tensor where all have as many."""
    if len(set(counts)) == 1:
        return keep[:, : counts[0]]
    return tuple(row[:count] for row, count in zip(keep, counts, strict=True))


def mean_plan(
    owner: Int[Tensor, "B N"], counts: Sequence[int], dtype: torch.dtype = torch.float32
) -> TokenPlan:
    """Average the tokens that have the same owner, which stands for them.

    Args:
        owner: Of each token, -1 for none.
        counts: Owners of each row, or of all of them; the plan is ragged where they differ.
        dtype: Of the weights.
    """
    keep, slots = kept_and_slots(owner, max(counts))
    into = owner.clamp(min=0)
    one = (owner >= 0).to(dtype)
    members = torch.zeros_like(one).scatter_add_(1, into, one).gather(1, into)
    weight = members.clamp(min=1).reciprocal()
    return TokenPlan(keep=ragged(keep, counts), assign=slots, weight=weight)
