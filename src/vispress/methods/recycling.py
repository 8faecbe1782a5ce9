"""Recycling of dropped tokens into means of clusters, as SparseVLM does it."""

import torch
from jaxtyping import Float
from torch import Tensor

from vispress.methods.base import descending, upcast
from vispress.methods.clusters import dpc_clusters
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
    again = ranked[:, kept : kept + count]
    rows = torch.arange(len(x), device=x.device)[:, None]
    empty = again[:, :0], again
    again_x = upcast(x[rows, again])
    centres, label = dpc_clusters(again_x, clusters, noise) if clusters else empty
    centre = again.gather(1, centres)
    keep = torch.cat([ranked[:, :kept], centre], dim=1).sort(dim=1).values
    owner = torch.full_like(ranked, -1).scatter(1, ranked[:, :kept], ranked[:, :kept])
    owner = owner.scatter(1, again, centre.gather(1, label))
    number = torch.arange(keep.shape[1], device=x.device).expand_as(keep)
    slot = torch.zeros_like(ranked).scatter(1, keep, number)
    size = torch.zeros_like(centre).scatter_add(1, label, torch.ones_like(label))
    weight = torch.ones_like(score).scatter(1, again, 1 / size.gather(1, label).to(score))
    assign = slot.gather(1, owner.clamp(min=0)).where(owner >= 0, -1)
    return TokenPlan(keep=keep, assign=assign, weight=weight)
