"""Runs of frames that belong together: how FastVID, PruneVid and HoliTom cut a video.

On the host, as what is kept depends on them; the methods fetch similarities once a bucket.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Scene = tuple[int, int]
"""First frame, and the frame behind the last."""


def adjacent_cosine(x: Float[Tensor, "B F D"]) -> Float[Tensor, "B F1"]:
    """Cosine of each frame to the next."""
    return F.cosine_similarity(x[:, :-1], x[:, 1:], dim=-1)


def dynamic_scenes(cosine: Sequence[float], least: int, threshold: float) -> list[Scene]:
    """FastVID's: cut where frames are least alike, and wherever they are not alike enough.

    Args:
        cosine: Of each frame to the next.
        least: Scenes made in any case, if there are as many frames; ties cut earlier.
        threshold: Cosines below are cuts.
    """
    order = sorted(range(len(cosine)), key=lambda i: (cosine[i], i))
    cuts = set(order[: least - 1]) | {i for i, c in enumerate(cosine) if c < threshold}
    starts = [0, *(i + 1 for i in sorted(cuts))]
    return list(zip(starts, [*starts[1:], len(cosine) + 1], strict=True))
