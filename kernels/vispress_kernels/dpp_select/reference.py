"""What `dpp_select` means, in plain torch: greedy MAP by an incremental Cholesky factor."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from vispress_kernels.assign_nearest.reference import unit_rows
from vispress_kernels.products import Products, samples_together


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
    if (together := samples_together(x)) < B:
        parts = zip(torch.split(x, together), torch.split(relevance, together), strict=True)
        return torch.cat([dpp_select_reference(own, r, num_keep) for own, r in parts])
    relevance, gain, floor = dpp_start(x, relevance)
    # columns of the factor; L has no rank beyond D
    rank = min(num_keep, D)
    products = Products(unit_rows(x).mul_(relevance[..., None]), rank)  # L, row by row
    batch, none = torch.arange(B, device=x.device), gain.new_zeros(1)
    factor = gain.new_empty(B, rank, N)
    picks = [torch.empty(B, 0, dtype=torch.int64, device=x.device)]
    most = [gain[:, :0]]  # what each pick gained
    for step in range(rank):
        one = gain.argmax(1, keepdim=True)
        picks.append(one)
        most.append(gain.gather(1, one))
        pick, known = one[:, 0], factor[:, :step]
        row = products.row(pick) - (known[batch, :, pick][:, None] @ known)[:, 0]
        column = torch.div(row, most[-1].sqrt(), out=factor[:, step])
        # a NaN gains nothing
        gain = torch.fmax(gain.addcmul(column, column, value=-1), none).scatter_(1, one, 0.0)
    found = torch.cat(most, 1) > floor[:, None]
    return _ended_by_relevance(torch.cat(picks, 1), found, relevance, num_keep)


def _ended_by_relevance(order: Tensor, found: Tensor, relevance: Tensor, num_keep: int) -> Tensor:
    """Put the most relevant of other tokens in the place of picks from the first not found on."""
    B, N = relevance.shape
    found = (~found).cumsum(1) == 0
    taken = torch.zeros(B, N + 1, dtype=torch.bool, device=order.device)
    taken = taken.scatter_(1, torch.where(found, order, N), True)[:, :N]  # others go nowhere
    rest = relevance.masked_fill(taken, float("-inf")).sort(dim=1, descending=True, stable=True)
    place = torch.arange(num_keep, device=order.device) - found.sum(1, keepdim=True)
    by_relevance = rest.indices.gather(1, place.clamp_(min=0))
    missing = (0, num_keep - order.shape[1])
    return torch.where(pad(found, missing), pad(order, missing), by_relevance)
