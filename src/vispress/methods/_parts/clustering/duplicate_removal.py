"""Removal of duplicates from a ranked list, round by round: a part of VisPruner and FlashVLM."""

from jaxtyping import Float, Int
from torch import Tensor

from vispress_kernels.distinct_select import distinct_select


def remove_duplicates(
    ranked: Int[Tensor, "b R"], x: Float[Tensor, "b n d"], num_keep: int, step: int
) -> Int[Tensor, "b K"]:
    """Drop duplicates from a ranked list until `num_keep` are left, in the list's last order.

    What a round drops is said by `distinct_select` of the kernels.

    Args:
        ranked: Tokens, the most attended first.
        x: Features of all tokens, compared by cosine.
        num_keep: K, in `[0, R]`.
        step: Tokens dropped a round, at most.
    """
    if num_keep in (0, ranked.shape[1]):
        return ranked[:, :num_keep]
    own = x.gather(1, ranked[..., None].expand(-1, -1, x.shape[2]))
    return ranked.gather(1, distinct_select(own, num_keep, step))
