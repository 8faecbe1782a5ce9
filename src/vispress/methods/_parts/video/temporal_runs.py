"""Tokens of one place in frames that follow each other, and runs of them that are averaged."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from vispress.devices import sent
from vispress.methods.base import descending
from vispress.types import TokenPlan


def likeness(x: Float[Tensor, "B N D"], place: Int[Tensor, "B N"]) -> Float[Tensor, "B N"]:
    """Cosine of each token to the one before it at its place; `-inf` where there is none.

    Args:
        x: Tokens in raster order, frame after frame.
        place: Place of each in its frame; -1 for tokens that have none.
    """
    placed, order = place.sort(dim=1, stable=True)
    own = x.gather(1, order[..., None].expand_as(x))
    cosine = F.cosine_similarity(own[:, 1:], own[:, :-1], dim=2)
    followed = (placed[:, 1:] == placed[:, :-1]) & (placed[:, 1:] >= 0)
    cosine = F.pad(cosine.where(followed, float("-inf")), (1, 0), value=float("-inf"))
    return cosine.scatter(1, order, cosine)


def run_starts(
    likeness: Float[Tensor, "B N"], place: Int[Tensor, "B N"], merges: Sequence[int]
) -> Int[Tensor, "B N"]:
    """The token that each one is merged into: the first of its run.

    Args:
        likeness: As above; so many tokens as `merges` says are merged into the one before them,
            the most alike first, of equals the earlier.
        place: As above.
        merges: Of each row, not more than have one before them.
    """
    count = sent(torch.tensor(merges), place.device)[:, None]
    number = torch.arange(place.shape[1], device=place.device).expand_as(place)
    best, order = descending(likeness), place.argsort(dim=1, stable=True)
    merged = best.scatter(1, best, number) < count  # by their ranks
    start = number.masked_fill(merged.gather(1, order), 0).cummax(dim=1).values
    return order.scatter(1, order, order.gather(1, start))


def mean_plan(
    owner: Int[Tensor, "B N"], counts: Sequence[int], dtype: torch.dtype = torch.float32
) -> TokenPlan:
    """The plan that averages tokens with the same owner, which stands for them.

    Args:
        owner: The token that each one is folded into, -1 for none; owners own themselves.
        counts: Owners of each row; the plan is ragged where they differ.
        dtype: Of the weights.
    """
    survives = owner == torch.arange(owner.shape[1], device=owner.device)
    order = survives.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    folded, into = owner >= 0, owner.clamp(min=0)
    slot = (survives.cumsum(dim=1) - 1).gather(1, into).where(folded, -1)
    one = folded.to(dtype)
    size = torch.zeros_like(one).scatter_add_(1, into, one).gather(1, into)
    same = len(set(counts)) == 1
    keep = order[:, : counts[0]] if same else tuple(map(_first, order, counts))
    return TokenPlan(keep=keep, assign=slot, weight=size.clamp(min=1).reciprocal())


def _first(row: Int[Tensor, "N"], count: int) -> Int[Tensor, "K"]:
    return row[:count]
