"""Greedy choice of tokens that cover all tokens of their image and fit its text: a part of CATP."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.methods.diversity import unit
from vispress_kernels.assign_nearest.reference import first_equal
from vispress_kernels.maxmin_select.reference import first_of_best

MOST_PRODUCTS = 1 << 24
"""Cosines that exist at a time: those of one image, or of as many small ones."""


def cover(
    x: Float[Tensor, "B N D"], text: Float[Tensor, "B D"], weight: float, num_keep: int
) -> tuple[Int[Tensor, "B K"], Float[Tensor, "B K"]]:
    """Maximise `sum_x max_y sim(x, y) + weight * sum_y sim(y, text)` greedily, one token a step.

    The similarity is `(cos + 1) / 2`. Of equal gains the earlier token is taken. A gain changes
    with every pick and for every token, so the cosines of an image are held while it is worked on.

    Returns:
        The tokens in the order taken, and the gain of each.
    """
    at_a_time = max(1, MOST_PRODUCTS // x.shape[1] ** 2)
    found = [
        _cover(own, one, weight, num_keep)
        for own, one in zip(torch.split(x, at_a_time), torch.split(text, at_a_time), strict=True)
    ]
    order, gains = zip(*found, strict=True)
    return torch.cat(order), torch.cat(gains)


def _cover(x: Tensor, text: Tensor, weight: float, num_keep: int) -> tuple[Tensor, Tensor]:
    tokens = unit(x)
    twin = first_equal(tokens)  # a product may round equal tokens differently
    batch = torch.arange(len(x), device=x.device)
    similar = (tokens @ tokens.mT + 1) / 2  # columns are candidates
    fit = weight * ((tokens * unit(text)[:, None]).sum(dim=2) + 1) / 2
    best = similar.new_zeros(x.shape[:2])  # similarity of each token to the closest taken one
    taken = torch.zeros_like(best, dtype=torch.bool)
    apart, order, gains = torch.empty_like(similar), [], []
    for _ in range(num_keep):
        torch.sub(similar, best[..., None], out=apart)
        gain = apart.clamp_(min=0).sum(dim=1).add_(fit).gather(1, twin)
        pick = first_of_best(gain, taken)
        order.append(pick)
        gains.append(gain[batch, pick])
        taken.scatter_(1, pick[:, None], True)  # assigning by index would wait for the device
        torch.maximum(best, similar[batch, :, twin[batch, pick]], out=best)
    return torch.stack(order, dim=1), torch.stack(gains, dim=1)
