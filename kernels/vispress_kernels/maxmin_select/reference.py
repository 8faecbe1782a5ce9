"""What `maxmin_select` means, in plain torch: one row of distances a step."""

import torch
from torch import Tensor

from vispress_kernels.assign_nearest.reference import assign_nearest_reference, unit_rows
from vispress_kernels.products import Products, fits, samples_together


def zero_distance(dtype: torch.dtype) -> float:
    """Distances up to this are 0: what is left of `1 - 1` by rounding decides nothing."""
    return 8 * torch.finfo(dtype).eps


def maxmin_select_reference(
    x: Tensor, num_keep: int, first: Tensor | None, weight: Tensor | None
) -> Tensor:
    """Greedy farthest points, in the order chosen; without a device sync.

    Without a `first` they start from the most isolated token.
    """
    B, N, D = x.shape
    if (together := samples_together(x)) < B:
        parts = [slice(i, i + together) for i in range(0, B, together)]
        found = (
            maxmin_select_reference(
                x[i],
                num_keep,
                None if first is None else first[i],
                None if weight is None else weight[i],
            )
            for i in parts
        )
        return torch.cat(list(found))
    unit = unit_rows(x)
    if first is None and not fits(N, D):
        first = most_isolated(assign_nearest_reference(x, x, True)[1])
    products = Products(unit, num_keep, whole=first is None)
    pick = most_isolated(products.nearest()) if first is None else first
    zero = zero_distance(unit.dtype)
    nearest = unit.new_full((B, N), float("inf"))  # distance to the closest one chosen so far
    chosen = torch.zeros(B, N, dtype=torch.bool, device=x.device)
    weight = None if weight is None else weight.to(nearest.dtype)
    picks = [pick]
    while len(picks) < num_keep:
        chosen.scatter_(1, pick[:, None], True)
        distance = 1 - products.row(pick)
        nearest = torch.minimum(nearest, distance.masked_fill_(distance <= zero, 0.0))
        pick = first_of_best(nearest if weight is None else nearest * weight, chosen)
        picks.append(pick)
    return torch.stack(picks, 1)


def most_isolated(nearest: Tensor) -> Tensor:
    """The token `[B]` whose nearest other is farthest, by that one's cosine `[B, N]`; -inf: none.

    Mutual neighbours tie, and which of them rounds lower depends on the order of a sum; a token
    without a comparable neighbour (NaN) is not isolated but unusable.
    """
    distance = (1 - nearest).masked_fill(nearest.isinf(), -1.0)
    slack = zero_distance(distance.dtype)
    return (distance >= distance.amax(1, keepdim=True) - slack).to(torch.int8).argmax(1)


def first_of_best(score: Tensor, chosen: Tensor | None = None) -> Tensor:
    """Row-wise arg-max: the lowest index among equals; NaN after all numbers, chosen ones never."""
    score = score.nan_to_num(nan=torch.finfo(score.dtype).min)
    if chosen is not None:
        score = score.masked_fill(chosen, float("-inf"))
    return score.argmax(-1)
