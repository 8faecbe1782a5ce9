"""Split a budget over the crops or frames of one image."""

import torch
from jaxtyping import Int
from torch import Tensor

from vispress.budget import allocate


def segment_shares(segments: Int[Tensor, "N"], num_keep: int) -> dict[int, int]:
    """Split a budget over the segments of one image (host tensor), newline tokens (-1) first.

    Newlines are kept and count towards the budget. When it cannot hold all newlines and one token a
    segment, they are dropped, but for as many as the budget needs (what is left of a tall picture
    may be mostly newlines). The rest is split in proportion to segment sizes.

    Returns:
        Shares that add up to `num_keep`, or to all tokens where these are fewer.
    """
    ids, counts = torch.unique(segments, return_counts=True)
    sizes = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    newlines = sizes.pop(-1, 0)
    if num_keep < newlines + len(sizes):
        newlines = min(newlines, max(0, num_keep - sum(sizes.values())))
    shares = allocate(num_keep - newlines, list(sizes.values()))
    return {-1: newlines} | dict(zip(sizes, shares, strict=True))
