"""Mark by logical position which visual tokens of a bucket there are, and which go."""

import torch
from torch import Tensor

from vispress.runtime.tokens.images import Bucket


def marked(
    drop: Tensor | None, shape: tuple[int, int], part: Bucket, kept: Bucket, keep: Tensor
) -> Tensor:
    """Note which tokens of a bucket go, beside those of others.

    Args:
        drop: `[B, Q]` bool, what goes of other buckets; None for nothing. May be changed.
        shape: B and Q.
        part: The bucket.
        kept: The same with the kept tokens alone.
        keep: `[Bk, K]`, which these are.

    Returns:
        `[B, Q]` bool.
    """
    if [image.sample for image in part.images] == list(range(shape[0])):  # a row a sample
        mark = _mark(part, shape)
        gone = mark.scatter(1, kept.positions, False)
        kept.marks = mark, gone
        return gone if drop is None else drop | gone
    gone = torch.ones_like(part.positions, dtype=torch.bool).scatter(1, keep, False)
    if drop is None:
        drop = torch.zeros(shape, dtype=torch.bool, device=keep.device)
    drop[part.sample.unsqueeze(1), part.positions] = gone
    return drop


def _mark(bucket: Bucket, shape: tuple[int, int]) -> Tensor:
    """`[B, Q]` bool: where the tokens are, of a bucket with a row for each sample."""
    if bucket.marks is None:
        none = torch.zeros(shape, dtype=torch.bool, device=bucket.positions.device)
        bucket.marks = none.scatter_(1, bucket.positions, True), None
    mark, gone = bucket.marks
    if gone is not None:
        mark = mark ^ gone
        bucket.marks = mark, None
    return mark
