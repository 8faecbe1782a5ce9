"""What `maxmin_select` means, in plain torch: one row of distances a step.

All of them at once only where that takes no more memory than the tokens (N <= D).
"""

import torch
from torch import Tensor

from vispress_kernels.assign_nearest.reference import unit_rows


def zero_distance(dtype: torch.dtype) -> float:
    """Distances up to this are 0: what is left of `1 - 1` by rounding decides nothing."""
    return 8 * torch.finfo(dtype).eps


def maxmin_select_reference(
    x: Tensor, num_keep: int, first: Tensor, weight: Tensor | None
) -> Tensor:
    """Greedy farthest points, in the order chosen; without a device sync."""
    B, N, D = x.shape
    unit = unit_rows(x)
    twin = first_equal(unit)
    whole = unit @ unit.mT if N <= D else None
    zero = zero_distance(unit.dtype)
    batch = torch.arange(B, device=x.device)
    nearest = unit.new_full((B, N), float("inf"))  # distance to the closest one chosen so far
    chosen = torch.zeros(B, N, dtype=torch.bool, device=x.device)
    order = torch.empty(B, num_keep, dtype=torch.int64, device=x.device)
    pick = first
    for step in range(num_keep):
        order[:, step] = pick
        chosen[batch, pick] = True
        if whole is None:
            cosine = (unit @ unit[batch, pick][..., None])[..., 0]
        else:
            cosine = whole[batch, pick]
        distance = 1 - cosine.gather(1, twin)
        nearest = torch.minimum(nearest, distance.masked_fill(distance <= zero, 0.0))
        score = nearest if weight is None else nearest * weight.to(nearest.dtype)
        pick = first_of_best(score, chosen)
    return order


def first_of_best(score: Tensor, chosen: Tensor | None = None) -> Tensor:
    """Row-wise arg-max: the lowest index among equals; NaN after all numbers, chosen ones never."""
    score = score.nan_to_num(nan=torch.finfo(score.dtype).min)
    if chosen is not None:
        score = score.masked_fill(chosen, float("-inf"))
    return score.argmax(-1)


def first_equal(rows: Tensor, block: int = 1024) -> Tensor:
    """Index of the first row equal to each row of `[B, N, D]`, itself where there is none.

    A matrix-vector product may round equal rows differently by their place; read through this
    index, equal rows have equal products.

    Args:
        rows: Any values, N at least 1; a NaN equals nothing.
        block: Rows compared at a time.
    """
    B, N, D = rows.shape
    # summed token by token, so that equal rows have equal sums and stand side by side once sorted
    mix = torch.arange(1, D + 1, device=rows.device).mul(0.61803398875).frac().to(rows.dtype)
    parts = [(rows[:, i : i + block] * mix).sum(-1) for i in range(0, N, block)]
    order = torch.cat(parts, 1).sort(dim=1, stable=True).indices
    batch = torch.arange(B, device=rows.device)[:, None]
    fresh = torch.ones(B, N, dtype=torch.bool, device=rows.device)
    for i in range(1, N, block):
        here = order[:, i : i + block]
        same = rows[batch, here] == rows[batch, order[:, i - 1 : i - 1 + here.shape[1]]]
        fresh[:, i : i + here.shape[1]] = ~same.all(-1)
    places = torch.arange(N, device=rows.device)
    leader = torch.where(fresh, places, 0).cummax(1).values  # where each run of equals starts
    return torch.empty_like(order).scatter(1, order, order.gather(1, leader))
