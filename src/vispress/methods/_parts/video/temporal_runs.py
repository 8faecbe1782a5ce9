"""Tokens of one place in frames that follow each other, and runs of them."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from vispress.devices import sent
from vispress.methods.base import descending


def likeness(x: Float[Tensor, "B N D"], place: Int[Tensor, "B N"]) -> Float[Tensor, "B N"]:
    """Compute each token's cosine to the one before it at its place; `-inf` where none is.

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
    """Find the token that each one is merged into: the first of its run.

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
