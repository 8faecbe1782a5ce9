"""Anchor frames of a scene, their density peaks, and what they take in: parts of FastVID."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.methods._parts.clustering.density_peaks import dpc_scores
from vispress.methods.base import descending
from vispress_kernels import Backend
from vispress_kernels.assign_nearest import assign_nearest
from vispress_kernels.merge_tokens import merge_tokens

NEIGHBOURS = 4
"""Tokens that a density looks at, itself included."""


def anchor_frames(length: int, total: int, room: int, step: int) -> list[tuple[int, int]]:
    """Frames of a scene that hold merged tokens, the last first, and how many each holds.

    Args:
        length: Frames of the scene.
        total: Merged tokens of the scene, at most `length * room`; what does not divide goes to
            later frames.
        room: Tokens of a frame that can be merged into.
        step: Frames from anchor to anchor; fewer where anchors would be too few for `total`.
    """
    while step > 1 and -(-length // step) * room < total:
        step -= 1
    anchors = range(length - 1, -1, -step)
    shares = [total // len(anchors) + (i < total % len(anchors)) for i in range(len(anchors))]
    return [(frame, share) for frame, share in zip(anchors, shares, strict=True) if share]


@torch.no_grad()
def centres(x: Float[Tensor, "n D"], count: int) -> Int[Tensor, "C"]:
    """Tokens with the largest density times distance to a denser one."""
    density, distance = dpc_scores(x[None], NEIGHBOURS)
    return descending(density * distance)[0, :count]


def fold_into(
    x: Float[Tensor, "N D"],
    peaks: Int[Tensor, "C"],
    members: Int[Tensor, "m"],
    alpha: float,
    backend: Backend = "auto",
) -> Float[Tensor, "C D"]:
    """New values of the peaks: `w` of themselves and `1 - w` of the mean of their n members.

    A member goes to the peak with the most similar direction; `w = max(1 / (n + 1), alpha)`.
    """
    own = x[members][None]
    nearest, _ = assign_nearest(own, x[peaks][None], backend=backend)
    mean = merge_tokens(own, nearest, len(peaks), reduce="mean", backend=backend)[0]
    count = torch.zeros_like(peaks).scatter_add(0, nearest[0], torch.ones_like(members))
    weight = (1 / (count + 1).to(x)).clamp(min=alpha)[:, None]
    return weight * x[peaks] + (1 - weight) * mean
