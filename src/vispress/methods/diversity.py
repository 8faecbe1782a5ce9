"""Greedy max-min selection: each pick is the token farthest from everything picked so far.

Memory is O(N D): a running minimum distance and one pass over the tokens a pick, no N x N matrix.
Distances are reduced token by token, not by a matrix product: there a token's rounding depends on
its place in the tile, and equal tokens (newlines, flat background) would no longer tie.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from vispress.methods.base import upcast


def unit(x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
    """Tokens at length 1, in at least fp32; zero tokens stay zero."""
    return F.normalize(upcast(x), dim=-1)


def nearest_distance(x: Float[Tensor, "B N D"], *, block: int = 1024) -> Float[Tensor, "B N"]:
    """Cosine distance of each unit token to its nearest other one.

    Args:
        x: Unit tokens.
        block: Rows of the similarity matrix that exist at a time.
    """
    nearest = []
    for start in range(0, x.shape[1], block):
        similarity = x[:, start : start + block] @ x.mT  # [B, block, N]
        similarity.diagonal(offset=start, dim1=1, dim2=2).fill_(float("-inf"))
        nearest.append(similarity.argmax(dim=-1))
    other = torch.cat(nearest, dim=1)[..., None].expand_as(x)
    # once more token by token: two tokens nearest to each other must tie exactly
    return 1 - (x * x.gather(1, other)).sum(dim=-1)


def largest_cosine(
    x: Float[Tensor, "B N D"], others: Float[Tensor, "B M D"], *, block: int = 1024
) -> Float[Tensor, "B N"]:
    """Cosine of each unit token to the most similar of the others, `block` rows at a time."""
    return torch.cat([(b @ others.mT).amax(dim=2) for b in torch.split(x, block, dim=1)], dim=1)


def maxmin_select(
    x: Float[Tensor, "B N D"],
    num_keep: int,
    first: Int[Tensor, "B"],
    weight: Float[Tensor, "B N"] | None = None,
) -> Int[Tensor, "B K"]:
    """Pick `first`, then always the token with the largest weighted distance to all picked.

    Args:
        x: Unit tokens.
        num_keep: K, in `[1, N]`.
        first: First pick of each image.
        weight: Factor on each token's distance; None for 1.

    Returns:
        Distinct indices in picking order; ties go to the earlier token.
    """
    order = first.new_empty(x.shape[0], num_keep)
    taken = torch.zeros_like(x[..., 0], dtype=torch.bool)
    distance = torch.full_like(x[..., 0], float("inf"))
    pick = first
    for step in range(num_keep):
        order[:, step] = pick
        taken.scatter_(1, pick[:, None], True)
        latest = x.gather(1, pick[:, None, None].expand(-1, 1, x.shape[2]))
        distance = torch.minimum(distance, 1 - (x * latest).sum(dim=-1))
        gain = distance if weight is None else distance * weight
        # NaN (from infinite features) is the last resort, but still before a second pick
        pick = gain.nan_to_num(nan=-3.0).masked_fill(taken, float("-inf")).argmax(dim=1)
    return order
