"""Bipartite soft matching: tokens at even places may join their most similar token at an odd place.

Bolya et al., ICLR 2023, arXiv:2210.09461; https://github.com/facebookresearch/ToMe at af95e4b.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.methods.base import descending
from vispress_kernels import Backend
from vispress_kernels.assign_nearest import assign_nearest


def match(
    metric: Float[Tensor, "B n D"],
    count: Int[Tensor, "B"],
    *,
    protect_first: bool = False,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "B a"], Int[Tensor, "B a"]]:
    """Cosine and number of the most similar odd token, for each of the `a` even tokens.

    Args:
        metric: What is compared; at least two tokens.
        count: Tokens of each row; what is behind them is no token and gets cosine `-inf`.
        protect_first: The first token joins none: its cosine is `-inf`.
        backend: Kernels to use.
    """
    beyond = torch.arange(metric.shape[1], device=metric.device) >= count[:, None]
    # a NaN is never nearest
    odd = metric[:, 1::2].masked_fill(beyond[:, 1::2, None], float("nan"))
    nearest, cosine = assign_nearest(metric[:, ::2], odd, backend=backend)
    cosine = cosine.masked_fill(beyond[:, ::2], float("-inf"))
    if protect_first:
        cosine = cosine.index_fill(
            1, torch.zeros(1, dtype=torch.int64, device=cosine.device), float("-inf")
        )
    return cosine, nearest


def fold(
    cosine: Float[Tensor, "B a"],
    nearest: Int[Tensor, "B a"],
    count: Int[Tensor, "B"],
    merges: Int[Tensor, "B"],
    num_tokens: int,
    *,
    in_order: bool,
) -> Int[Tensor, "B n"]:
    """New place of every token when the `merges` most similar pairs of each row are merged.

    Even tokens that stay come first, then the odd ones. Ties merge the earlier token.

    Args:
        cosine: As `match` gives it.
        nearest: As `match` gives it.
        count: Tokens of each row.
        merges: Pairs to merge in each row, at most `count // 2`.
        num_tokens: n.
        in_order: Even tokens that stay keep their order; else the most similar comes first.
    """
    rank = descending(cosine).argsort(dim=1)
    evens, odds = (count + 1) // 2, count // 2
    stays = (rank >= merges[:, None]) & (rank < evens[:, None])
    own = stays.cumsum(1) - 1 if in_order else rank - merges[:, None]
    first_odd = (evens - merges)[:, None]
    joined = torch.where(stays, own, first_odd + nearest)
    places = torch.empty(len(cosine), num_tokens, dtype=torch.int64, device=cosine.device)
    places[:, ::2] = joined.masked_fill(rank >= evens[:, None], -1)
    odd = torch.arange(num_tokens // 2, device=cosine.device)
    places[:, 1::2] = torch.where(odd < odds[:, None], first_odd + odd, -1)
    return places


def schedule(num_layers: int, merges: int, inflect: float = 0.0) -> list[int]:
    """Merges in each layer: constant, or linear from `merges * (1 - inflect)` to the mirror of it.

    Args:
        num_layers: Layers.
        merges: Mean a layer.
        inflect: In `[-1, 1]`; 1 starts at 0 and rises, -1 starts at twice the mean and falls.
    """
    low = int(merges * (1.0 - inflect))
    step = (2 * merges - 2 * low) / max(1, num_layers - 1)
    return [int(low + step * layer) for layer in range(num_layers)]
