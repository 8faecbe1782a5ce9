"""What `distinct_select` means, in plain torch: a few calls a round."""

import torch
from torch import Tensor

from vispress_kernels.assign_nearest.reference import unit_rows
from vispress_kernels.products import MOST_HELD, gram

ON_HOST, ON_DEVICE = 1 << 16, MOST_HELD
"""Cosines of the lists that are worked on together, where these are several."""


def distinct_select_reference(x: Tensor, num_keep: int, step: int) -> Tensor:
    """Places in the list that are left, in its last order; some lists at a time."""
    B, N, _ = x.shape
    if B == 0 or num_keep in (0, N):
        return torch.arange(num_keep, device=x.device).repeat(B, 1)
    together = max(1, (ON_DEVICE if x.is_cuda else ON_HOST) // N**2)
    parts = torch.split(unit_rows(x), together)
    return torch.cat([_distinct(own, num_keep, step) for own in parts])


def least_cosine(dtype: torch.dtype) -> float:
    """Negated cosines below this are this: what rounding made of -1 is one value."""
    return 8 * torch.finfo(dtype).eps - 1


def _distinct(x: Tensor, num_keep: int, step: int) -> Tensor:
    length = x.shape[1]
    least = least_cosine(x.dtype)
    held = gram(x).neg_().clamp_(min=least) if length**2 <= MOST_HELD else None
    left = torch.arange(length, device=x.device).expand(len(x), -1)
    while length > num_keep:
        even, odd = left[:, 0::2], left[:, 1::2]
        drop = min(step, length - num_keep, even.shape[1])
        if held is None:
            distance = _to_nearest(x, even, odd).clamp_(min=least)
        else:
            distance = _held_to_nearest(held, even, odd)
        order = distance.sort(dim=1, stable=True)[1]
        left = torch.cat([even.gather(1, order[:, drop:]), odd], dim=1)
        length -= drop
    return left


def _to_nearest(x: Tensor, even: Tensor, odd: Tensor) -> Tensor:
    """Compute the least negated cosine of each even token to an odd one, `[b, E]`, by blocks."""
    rows = torch.arange(len(x), device=x.device)[:, None]
    own, others = x[rows, even], x[rows, odd].mT
    blocks = torch.split(own, max(1, x.shape[2]), dim=1)
    return -torch.cat([(block @ others).amax(dim=2) for block in blocks], dim=1)


def _held_to_nearest(held: Tensor, even: Tensor, odd: Tensor) -> Tensor:
    """Look it up in negated cosines `[b, R, R]`; of one list by rows and columns: it is faster."""
    if len(held) == 1:
        return held[0].index_select(0, even[0]).index_select(1, odd[0]).amin(dim=1)[None]
    lists = torch.arange(len(held), device=held.device)[:, None, None]
    return held[lists, even[:, :, None], odd[:, None]].amin(dim=2)
