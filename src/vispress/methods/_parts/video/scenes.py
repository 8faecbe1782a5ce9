"""Runs of frames that belong together: how FastVID, PruneVid and HoliTom cut a video.

On the host, as what is kept depends on them; the methods fetch similarities once a bucket.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

Scene = tuple[int, int]
"""First frame, and the frame behind the last."""


def adjacent_cosine(x: Float[Tensor, "B F *t D"]) -> Float[Tensor, "B F1 *t"]:
    """Compute the cosine of each frame, or each place of it, to the next."""
    return F.cosine_similarity(x[:, :-1], x[:, 1:], dim=-1)


def dynamic_scenes(cosine: Sequence[float], least: int, threshold: float) -> list[Scene]:
    """Cut (FastVID) where frames are least alike, and wherever they are not alike enough.

    Args:
        cosine: Of each frame to the next.
        least: Scenes made in any case, if there are as many frames; ties cut earlier.
        threshold: Cosines below are cuts.
    """
    order = sorted(range(len(cosine)), key=lambda i: (cosine[i], i))
    cuts = set(order[: least - 1]) | {i for i, c in enumerate(cosine) if c < threshold}
    starts = [0, *(i + 1 for i in sorted(cuts))]
    return list(zip(starts, [*starts[1:], len(cosine) + 1], strict=True))


def refined(labels: Sequence[int]) -> list[int]:
    """Turn clusters of frames into runs (PruneVid).

    Of each label the longest runs stay, of two frames at least. From left to right, frames between
    them join the longer of the runs beside them, of equals the left one; it is longer by them for
    those that follow. Where no run stays all is one.
    """
    runs = scenes_of(labels)
    longest = dict.fromkeys(labels, 2)
    for start, end in runs:
        longest[labels[start]] = max(longest[labels[start]], end - start)
    stays = [run for run in runs if run[1] - run[0] == longest[labels[run[0]]]]
    if not stays:
        return [labels[0]] * len(labels)
    out, length = list(labels), [end - start for start, end in stays]
    for frame in range(len(labels)):
        left = sum(start <= frame for start, _ in stays) - 1
        if left >= 0 and frame < stays[left][1]:
            continue
        beside = [number for number in (left, left + 1) if 0 <= number < len(stays)]
        joined = max(beside, key=lambda number: length[number])  # of equals the first
        out[frame] = labels[stays[joined][0]]
        length[joined] += 1
    return out


def scenes_of(labels: Sequence[int]) -> list[Scene]:
    """List the runs of equal labels."""
    starts = [i for i, label in enumerate(labels) if i == 0 or label != labels[i - 1]]
    return list(zip(starts, [*starts[1:], len(labels)], strict=True))


def saving_scenes(same: Bool[Tensor, "F1 t"], longest: int = 1024) -> tuple[list[Scene], int]:
    """Find the runs that save most when places that never change are kept once (HoliTom).

    A run of W frames saves W - 1 tokens for each place that is the same all along; dynamic
    programming finds the best cut, of equals that with the shorter last run.

    Args:
        same: Whether each place is the same in a frame and the next; on the host.
        longest: Frames of a run at most.

    Returns:
        Runs in order, and how many tokens they save.
    """
    count = same.shape[0] + 1
    best, last = [0] * (count + 1), [1] * (count + 1)
    for end in range(1, count + 1):
        best[end], along = best[end - 1], torch.ones(same.shape[1], dtype=torch.bool)
        for length in range(2, min(longest, end) + 1):
            along = along & same[end - length]
            places = int(along.sum())
            if not places:
                break
            if (saved := best[end - length] + (length - 1) * places) > best[end]:
                best[end], last[end] = saved, length
    scenes, end = [], count
    while end:
        scenes.append((end - last[end], end))
        end -= last[end]
    return scenes[::-1], best[count]
