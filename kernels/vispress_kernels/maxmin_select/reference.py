"""What `maxmin_select` means, in plain torch: one row of distances a step, never N x N."""

import torch
from torch import Tensor

from vispress_kernels.assign_nearest.reference import unit_rows


def maxmin_select_reference(
    x: Tensor, num_keep: int, first: Tensor, weight: Tensor | None
) -> Tensor:
    """Greedy farthest points, in the order chosen; without a device sync."""
    B, N, _ = x.shape
    unit = unit_rows(x)
    batch = torch.arange(B, device=x.device)
    nearest = unit.new_full((B, N), float("inf"))  # distance to the closest one chosen so far
    chosen = torch.zeros(B, N, dtype=torch.bool, device=x.device)
    order = torch.empty(B, num_keep, dtype=torch.int64, device=x.device)
    pick = first
    for step in range(num_keep):
        order[:, step] = pick
        chosen[batch, pick] = True
        distance = 1 - (unit @ unit[batch, pick][..., None])[..., 0]
        nearest = torch.minimum(nearest, distance)
        score = nearest if weight is None else nearest * weight.to(nearest.dtype)
        pick = first_of_best(score, chosen)
    return order


def first_of_best(score: Tensor, chosen: Tensor | None = None) -> Tensor:
    """Row-wise arg-max: the lowest index among equals; NaN after all numbers, chosen ones never."""
    score = score.nan_to_num(nan=torch.finfo(score.dtype).min)
    if chosen is not None:
        score = score.masked_fill(chosen, float("-inf"))
    return score.argmax(-1)
