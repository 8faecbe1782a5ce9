"""Order tokens by score, and find the best of them, of all or of each segment."""

from functools import lru_cache

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
    alike = segments.stride(0) == 0 or bool((segments == segments[:1]).all())
    if alike:
        return _top_in_segments(score, segments[0], num_keep)
    rows = [
        _top_in_segments(row[None], own, num_keep) for row, own in zip(score, segments, strict=True)
    ]
    return torch.cat(rows)


def _top_in_segments(score: Tensor, segments: Tensor, num_keep: int) -> Tensor:
    picked = []
    for found, share in _groups(segments.numpy().tobytes(), num_keep):
        places = sent(found, score.device)
        own = top_indices(score[:, places].flatten(0, 1), share)
        whole = places.expand(len(score), *places.shape)
        picked.append(whole.gather(2, own.view(*whole.shape[:2], share)).flatten(1))
    return torch.cat(picked, dim=1).sort(dim=1).values


@lru_cache(maxsize=32)
def _groups(segments: bytes, num_keep: int) -> tuple[tuple[Tensor, int], ...]:
    """Places `[p, n]` of p segments of one size and share, on the host, and that share."""
    with torch.inference_mode(False), torch.device("cpu"):  # gradients may need them
        number = torch.frombuffer(bytearray(segments), dtype=torch.int64)
        found: dict[tuple[int, int], list[Tensor]] = {}
        for segment, share in segment_shares(number, num_keep).items():
            places = torch.where(number == segment)[0]
            found.setdefault((len(places), share), []).append(places)
        return tuple((torch.stack(places), share) for (_, share), places in found.items())
