"""Bipartite soft matching: tokens at even places may join their most similar token at an odd place.

Bolya et al., ICLR 2023, arXiv:2210.09461; https://github.com/facebookresearch/ToMe at af95e4b.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vispress_kernels import Backend
from vispress_kernels.assign_nearest import assign_nearest


def match(
    metric: Float[Tensor, "B n D"],
    count: Int[Tensor, "B"] | None,
    *,
    protect_first: bool = False,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "B a"], Int[Tensor, "B a"]]:
    """Find the most similar odd token, and its cosine, for each of the `a` even tokens.

    Args:
        metric: What is compared; at least two tokens.
        count: Tokens of each row; what is behind them is no token and gets cosine `-inf`. None
            where all are tokens.
        protect_first: The first token joins none: its cosine is `-inf`.
        backend: Kernels to use.
    """
    odd = metric[:, 1::2]
    beyond = None if count is None else _beyond(count, metric.shape[1])
    if beyond is not None:  # a NaN is never nearest
        odd = odd.masked_fill(beyond[:, 1::2, None], float("nan"))
    nearest, cosine = assign_nearest(metric[:, ::2], odd, backend=backend)
    if beyond is not None:
        cosine.masked_fill_(beyond[:, ::2], float("-inf"))
    if protect_first:
        cosine[:, 0].fill_(float("-inf"))
    return cosine, nearest


def fold(
    cosine: Float[Tensor, "B a"],
    nearest: Int[Tensor, "B a"],
    count: Int[Tensor, "B"] | None,
    merges: Int[Tensor, "B"] | int,
    num_tokens: int,
    *,
    in_order: bool,
) -> Int[Tensor, "B n"]:
    """Give every token its place once the `merges` most similar pairs of a row are merged.

    Even tokens that stay come first, then the odd ones. Ties merge the earlier token.

    Args:
        cosine: As `match` gives it, without NaN.
        nearest: As `match` gives it.
        count: Tokens of each row, or None, as above; -1 is the place of what is none.
        merges: Pairs to merge in each row, or in all of them; at most `count // 2`.
        num_tokens: n.
        in_order: Even tokens that stay keep their order; else the most similar comes first.
    """
    order = cosine.argsort(dim=1, descending=True, stable=True)
    number = torch.arange(order.shape[1], device=order.device).expand(len(order), -1)
    rank = order.scatter(1, order, number)
    cut = merges if isinstance(merges, int) else merges[:, None]
    evens = (num_tokens + 1) // 2 if count is None else (count[:, None] + 1) // 2
    first_odd, stays = evens - cut, rank >= cut
    # places counted from the one of the first odd token
    own = stays.cumsum(1) - (first_odd + 1) if in_order else rank - evens
    both = torch.stack([torch.where(stays, own, nearest), number], dim=2)
    places = both.view(len(order), -1)[:, :num_tokens] + first_odd
    return places if count is None else places.masked_fill(_beyond(count, num_tokens), -1)


def _beyond(count: Int[Tensor, "B"], num_tokens: int) -> Bool[Tensor, "B n"]:
    """Mark the places without a token."""
    return torch.arange(num_tokens, device=count.device) >= count[:, None]


def schedule(num_layers: int, merges: int, inflect: float = 0.0) -> list[int]:
    """Count merges a layer: constant, or linear from `merges * (1 - inflect)` to its mirror.

    Args:
        num_layers: Layers.
        merges: Mean a layer.
        inflect: In `[-1, 1]`; 1 starts at 0 and rises, -1 starts at twice the mean and falls.
    """
    low = int(merges * (1.0 - inflect))
    step = (2 * merges - 2 * low) / max(1, num_layers - 1)
    return [int(low + step * layer) for layer in range(num_layers)]
