"""Groups of tokens, named by whole numbers, and merged until they are few enough."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from vispress.methods._parts.clustering.bipartite import fold, match
from vispress_kernels import Backend
from vispress_kernels.merge_tokens import merge_tokens


def first_members(groups: Int[Tensor, "B n"]) -> Int[Tensor, "B n"]:
    """Place of the first token of each token's group."""
    named, order = groups.sort(dim=1, stable=True)
    starts = F.pad(named[:, 1:] != named[:, :-1], (1, 0), value=True)
    # places of group starts in the sorted row, carried on to the end of each group
    index = torch.arange(groups.shape[1], device=groups.device)
    start = (index * starts).cummax(dim=1).values
    return order.scatter(1, order, order.gather(1, start))


def dense(groups: Int[Tensor, "B n"]) -> tuple[Int[Tensor, "B n"], Int[Tensor, "B"]]:
    """Groups numbered 0, 1, ... in the order of their first tokens, and how many each row has."""
    first = first_members(groups)
    starts = first == torch.arange(groups.shape[1], device=groups.device)
    number = starts.cumsum(1)
    return number.gather(1, first) - 1, number[:, -1]


def owners(
    x: Float[Tensor, "B n D"], groups: Int[Tensor, "B n"], num_keep: int, backend: Backend
) -> Int[Tensor, "B n"]:
    """The kept place that each token goes to: `num_keep` places in every row, its group's first.

    Groups are merged until they are few enough; where they are too few, their later members stay.
    No count is read on the host.

    Args:
        x: Tokens; groups are compared by their means.
        groups: Equal numbers are one group.
        num_keep: K, at least 1 and at most n.
        backend: Kernels to use.
    """
    place, count = dense(groups)
    width = groups.shape[1]
    while width > num_keep:
        means = merge_tokens(x, place, width, reduce="mean", backend=backend)
        over = torch.minimum((count - num_keep).clamp(min=0), count // 2)
        edges = match(means, count, backend=backend)
        place = fold(*edges, count, over, width, in_order=False).gather(1, place)
        count, width = count - over, max(num_keep, (width + 1) // 2)
    index = torch.arange(place.shape[1], device=place.device)
    first = torch.full_like(place, place.shape[1])
    first = first.scatter_reduce_(1, place, index.expand_as(place), "amin").gather(1, place)
    keep = (first != index).to(torch.int8).argsort(dim=1, stable=True)[:, :num_keep]
    return first.scatter(1, keep, keep)
