"""Which tokens are padding: those whose patch lies in it by more than a share."""

from jaxtyping import Bool, Float
from torch import Tensor

THRESHOLD, THRESHOLDS = 0.5, {"pyramiddrop": 0.01}
"""Share of a patch above which it is padding, in the patches of most methods and of others."""


def padding_mask(
    share: Float[Tensor, "B N"], name: str, threshold: float | None
) -> Bool[Tensor, "B N"]:
    """Mark tokens that count as padding; none of an image that would be padding all over.

    Args:
        share: Padding of each token's patch, in `[0, 1]`.
        name: Method whose patch's threshold stands in for None.
        threshold: Share that is exceeded.
    """
    usual = THRESHOLDS.get(name, THRESHOLD)
    padded = share > (usual if threshold is None else threshold)
    return padded & ~padded.all(dim=1, keepdim=True)
