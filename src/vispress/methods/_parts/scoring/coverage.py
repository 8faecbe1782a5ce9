"""Greedy choice of tokens that cover all tokens of their image and fit its text: a part of CATP."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.methods._parts.scoring.cosines import unit
from vispress_kernels.assign_nearest.reference import first_equal

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
    first = first_equal(tokens) == torch.arange(x.shape[1], device=x.device)
    fit = weight * ((tokens * unit(text)[:, None]).sum(dim=2) + 1) / 2
    # [b, x, y]: similarity of x to y or to the closest taken token, whichever is higher. A product
    # may round equal tokens differently: later ones cover nothing, and wait until the first is in
    reach = (tokens @ tokens.mT).add_(1).div_(2).mul_(first[:, None]).clamp_(min=0)
    best, apart = torch.zeros_like(reach[..., :1]), torch.empty_like(reach)
    order = torch.empty(len(x), num_keep, dtype=torch.int64, device=x.device)
    gains = reach.new_empty(len(x), num_keep)
    for k in range(num_keep):
        gain = torch.sub(reach, best, out=apart).sum(dim=1).add_(fit)
        gain.scatter_(1, order[:, :k], float("-inf"))
        # of equals the first; a NaN, which counts as the highest, is in all gains of its image
        torch.max(gain, dim=1, keepdim=True, out=(gains[:, k : k + 1], order[:, k : k + 1]))
        pick = order[:, k : k + 1, None].expand(-1, x.shape[1], -1)
        torch.maximum(reach, torch.gather(reach, 2, pick, out=best), out=reach)
    return order, gains
