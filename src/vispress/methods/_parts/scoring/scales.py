"""One scale for scores of different kinds."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vispress.methods._parts.scoring.question import scaled
from vispress.methods.base import descending

Normalise = Literal["minmax", "rank"]


def normalised(
    score: Float[Tensor, "B N"], how: Normalise, counted: Bool[Tensor, "B N"] | None = None
) -> Float[Tensor, "B N"]:
    """The scores of each image in `[0, 1]`, in at least fp32.

    Args:
        score: Any range; NaN and infinities count as the lowest.
        how: `"minmax"`: 0 for the lowest, 1 for the highest, or 1 for all where they are equal;
            `"rank"`: `1 - i / N` for the i-th best, ties in order.
        counted: Tokens that set the scale of `"minmax"`; None for all.
    """
    if how == "rank":
        place = descending(score).argsort(dim=1)
        return 1 - place.to(torch.promote_types(score.dtype, torch.float32)) / score.shape[1]
    low = score.masked_fill(~score.isfinite(), float("inf")).amin(dim=1, keepdim=True)
    return scaled(torch.where(score.isfinite(), score, low), counted=counted)
