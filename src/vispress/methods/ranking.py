"""Order tokens by score, and find the best of them, of all or of each segment."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.devices import sent
from vispress.methods.segment_shares import segment_shares


def top_indices(score: Float[Tensor, "B N"], num_keep: int) -> Tensor:
    """Find the highest scores: ascending `[B, K]`; ties keep the earlier, NaN is lowest."""
    return descending(score)[:, :num_keep].sort(dim=-1).values


def descending(score: Float[Tensor, "*B N"]) -> Int[Tensor, "*B N"]:
    """Order all indices, the highest score first; ties keep the earlier first, NaN is lowest."""
    clean = score.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return clean.argsort(dim=-1, descending=True, stable=True)


def top_per_segment(
    score: Float[Tensor, "B N"], segments: Int[Tensor, "B N"], num_keep: int
) -> Int[Tensor, "B K"]:
    """Find the highest scores of each segment, with the budget split by `segment_shares`.

    Args:
        score: Higher = kept.
        segments: On the host; equal rows (an unpruned bucket) are handled at once.
        num_keep: K, per image.
    """
    if bool((segments == segments[:1]).all()):
        return _top_in_segments(score, segments[0], num_keep)
    rows = [
        _top_in_segments(row[None], own, num_keep) for row, own in zip(score, segments, strict=True)
    ]
    return torch.cat(rows)


def _top_in_segments(score: Tensor, segments: Tensor, num_keep: int) -> Tensor:
    picked = []
    for segment, share in segment_shares(segments, num_keep).items():
        places = sent(torch.where(segments == segment)[0], score.device)
        picked.append(places[top_indices(score[:, places], share)])
    return torch.cat(picked, dim=1).sort(dim=1).values
