"""What `dpp_select` means, in plain torch: greedy MAP by an incremental Cholesky factor."""

import torch
from torch import Tensor

from vispress_kernels.assign_nearest.reference import first_equal, unit_rows
from vispress_kernels.maxmin_select.reference import first_of_best


def dpp_start(x: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Relevance in the working dtype (NaN: 0), first gains `[B, N]`, and their noise floor `[B]`.

    Gains below the floor are rounding noise of what was subtracted: ten units of the largest gain.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    relevance = relevance.to(dtype).nan_to_num(nan=0.0)
    gain = relevance.square()
    return relevance, gain, 10 * torch.finfo(dtype).eps * gain.amax(1)


def dpp_select_reference(x: Tensor, relevance: Tensor, num_keep: int) -> Tensor:
    """Greedy MAP of `L = diag(r) cos(x, x) diag(r)`, in the order chosen; no device sync."""
    B, N, D = x.shape
    relevance, gain, floor = dpp_start(x, relevance)
    rows = unit_rows(x) * relevance[..., None]  # L = rows rows^T
    twin = first_equal(rows)
    batch = torch.arange(B, device=x.device)
    chosen = torch.zeros(B, N, dtype=torch.bool, device=x.device)
    order = torch.empty(B, num_keep, dtype=torch.int64, device=x.device)
    # columns of the factor; L has no rank beyond D
    factor = rows.new_zeros(B, min(num_keep, D), N)
    for step in range(num_keep):
        pick = first_of_best(gain, chosen)
        found = (gain[batch, pick] > floor) & (step < D)
        pick = torch.where(found, pick, first_of_best(relevance, chosen))
        order[:, step] = pick
        chosen[batch, pick] = True
        if step >= factor.shape[1]:
            continue
        row = (rows @ rows[batch, pick][..., None])[..., 0]
        known = factor[:, :step]
        row = (row - (known[batch, :, pick][:, None] @ known)[:, 0]).gather(1, twin)
        root = gain[batch, pick].clamp(min=floor).sqrt()
        column = torch.where(found[:, None], row / root.clamp(min=1e-30)[:, None], 0.0)
        factor[:, step] = column
        gain = (gain - column.square()).clamp(min=0.0)
    return order
