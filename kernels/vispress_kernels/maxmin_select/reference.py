"""What `maxmin_select` means, in plain torch: one row of distances a step.

All of them at once only where that takes no more memory than the tokens (N <= D).
"""

import torch
from torch import Tensor

from vispress_kernels.assign_nearest.reference import first_equal, unit_rows


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
