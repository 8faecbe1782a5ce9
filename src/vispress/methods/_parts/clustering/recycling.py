"""Recycling of dropped tokens into means of clusters, as SparseVLM does it."""

import torch
from jaxtyping import Float
from torch import Tensor

from vispress.methods._parts.clustering.density_peaks import dpc_clusters
from vispress.methods.base import descending, upcast
from vispress.types import TokenPlan


def recycled(dropped: int) -> tuple[int, int]:
    """How many of the dropped tokens are recycled, and into how many clusters."""
    count = int(0.3 * dropped) + 1
    return count, count // 10 + 1


def kept_of(num_keep: int, num_visual: int) -> int:
    """Tokens that stay themselves when they and the clusters make up `num_keep`.

    All of them, without clusters, where the budget is too small for both.
    """
    for kept in range(num_keep - 1, 0, -1):
        if kept + recycled(num_visual - kept)[1] <= num_keep:
            return kept
    return num_keep


def fold_dropped(
    x: Float[Tensor, "b n d"],
    score: Float[Tensor, "b n"],
    kept: int,
    clusters: int,
    noise: Float[Tensor, "b r"] | None = None,
) -> TokenPlan:
    """Keep the best, and put means of clusters of the best dropped tokens at their centres."""
    ranked, count = descending(score), recycled(score.shape[1] - kept)[0] if clusters else 0
    first, again = ranked[:, :kept], ranked[:, kept : kept + count]
    own, one = again[..., None].expand(-1, -1, x.shape[2]), torch.ones_like(score)
    centres = label = again[:, :0]
    if clusters:
        centres, label = dpc_clusters(upcast(x.gather(1, own)), clusters, noise)
    keep, order = torch.cat([first, again.gather(1, centres)], dim=1).sort(dim=1)
    number = torch.arange(keep.shape[1], device=x.device).expand_as(keep)
    slot = torch.empty_like(order).scatter_(1, order, number)  # of what stays, of each centre
    slots = torch.cat([slot[:, :kept], slot[:, kept:].gather(1, label)], dim=1)
    assign = torch.full_like(ranked, -1).scatter_(1, ranked[:, : kept + count], slots)
    size = torch.zeros_like(one[:, :clusters]).scatter_add_(1, label, one[:, :count])
    weight = one.scatter_(1, again, size.reciprocal().gather(1, label))
    return TokenPlan(keep=keep, assign=assign, weight=weight)
