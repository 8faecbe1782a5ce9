"""What `merge_tokens` means, in plain torch."""

import torch
from torch import Tensor


def merge_tokens_reference(
    x: Tensor, assign: Tensor, weight: Tensor | None, num_keep: int
) -> Tensor:
    """`out[b, k]` is the sum of `weight * x` over the tokens assigned to k; differentiable."""
    B, _N, D = x.shape
    rows = x if x.dtype == torch.float64 else x.float()
    if weight is not None:
        rows = rows * weight.to(rows.dtype)[..., None]
    total = sum_by_group(rows.flatten(0, 1), _slots(assign, num_keep), B * (num_keep + 1))
    return total.view(B, num_keep + 1, D)[:, :num_keep].to(x.dtype).contiguous()


def group_weights(assign: Tensor, weight: Tensor | None, num_keep: int) -> Tensor:
    """Weights `[B, N]` scaled to sum to 1 in every group that has any; differentiable."""
    B, N = assign.shape
    if weight is None:
        weight = torch.ones(B, N, device=assign.device)
    elif weight.dtype != torch.float64:
        weight = weight.float()
    slots = _slots(assign, num_keep)
    total = sum_by_group(weight.reshape(-1, 1), slots, B * (num_keep + 1))[slots, 0].view(B, N)
    return torch.where(total == 0, 0.0, weight / torch.where(total == 0, 1.0, total))


def _slots(assign: Tensor, num_keep: int) -> Tensor:
    """Row of each token in a `[B * (K + 1)]` table whose last row in each batch takes the rest."""
    inside = (assign >= 0) & (assign < num_keep)
    slots = torch.where(inside, assign, num_keep)
    batch = torch.arange(assign.shape[0], device=assign.device)[:, None]
    return (slots + batch * (num_keep + 1)).flatten()


def sum_by_group(rows: Tensor, slots: Tensor, num_slots: int) -> Tensor:
    """Add `[M, D]` rows into `[num_slots, D]`, in an order that does not change between runs."""
    out = rows.new_zeros(num_slots, rows.shape[1])
    if rows.is_cuda:
        # index_add would add with atomics; this one sorts
        return out.index_put((slots,), rows, accumulate=True)
    return out.index_add(0, slots, rows)
