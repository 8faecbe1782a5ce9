"""What `kmeans_starts` means, in plain torch: one row of distances a step."""

import torch
from torch import Tensor

from vispress_kernels.assign_nearest.reference import unit_rows
from vispress_kernels.products import Products


def kmeans_starts_reference(x: Tensor, drawn: Tensor) -> Tensor:
    """Indices in the order drawn; without a device sync."""
    tokens, (B, N, _), K = unit_rows(x), x.shape, len(drawn)
    products = Products(tokens, K)
    first = (drawn[:1] * N).long().clamp(max=N - 1)
    picks = [first.expand(B, 1)]
    zero = torch.zeros_like(tokens[..., 0])
    distance = torch.full_like(zero, float("inf"))
    for step in range(1, K):
        distance = torch.clamp(1 - products.row(picks[-1][:, 0]), zero, distance)
        mass = distance.square().cumsum(dim=1)
        up_to_last = mass[:, :-1].contiguous()  # what is behind them falls to the last token
        part = mass[:, -1:] * drawn[step]
        picks.append(torch.searchsorted(up_to_last, part, right=True))
    return torch.cat(picks, dim=1)
