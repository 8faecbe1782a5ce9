"""Soft forms of keeping the highest scores, whose gradient reaches what gives the scores."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_HALVINGS = 64
_MARGIN = 10.0


def standardised(
    score: Float[Tensor, "B N"], among: Bool[Tensor, "B N"] | None = None, least: float = 0.1
) -> Float[Tensor, "B N"]:
    """Shift scores to mean 0 and scale them to deviation 1, row by row.

    Args:
        score: Any range, in at least fp32.
        among: Tokens that mean and deviation are taken over; None for all.
        least: Least deviation that is divided by.
    """
    weight = torch.ones_like(score) if among is None else among.to(score)
    count = weight.sum(dim=1, keepdim=True).clamp(min=1.0)
    centred = score - (score * weight).sum(dim=1, keepdim=True) / count
    variance = (centred.square() * weight).sum(dim=1, keepdim=True) / count
    return centred / variance.clamp(min=least * least).sqrt()


def past_threshold(
    score: Float[Tensor, "B N"],
    num_keep: int,
    temperature: float,
    among: Bool[Tensor, "B N"] | None = None,
) -> Float[Tensor, "B N"]:
    """How far each score is past the `num_keep` highest, as a sigmoid: 1/2 between the two.

    Args:
        score: In at least fp32.
        num_keep: In `[1, N)`.
        temperature: Above 0; the smaller, the harder.
        among: Tokens that the highest are taken of; None for all.
    """
    ranked = score.detach() if among is None else score.detach().masked_fill(~among, -torch.inf)
    best = ranked.topk(num_keep + 1, dim=1).values[:, -2:]
    middle = best.nan_to_num(neginf=torch.finfo(score.dtype).min / 4).mean(dim=1, keepdim=True)
    return ((score - middle) / temperature).sigmoid()


def with_sum(score: Float[Tensor, "B N"], total: int | float) -> Float[Tensor, "B N"]:
    """Sigmoids of scores, moved by what lets each row sum up to a total.

    The shift is found by bisection; a step of Newton's from there has its gradient, `dt / ds_i =
    -v_i / sum(v)` with `v = m (1 - m)`.

    Args:
        score: In at least fp32.
        total: In `(0, N)`.
    """
    fixed = score.detach()
    low = -fixed.amax(dim=1, keepdim=True) - _MARGIN
    high = -fixed.amin(dim=1, keepdim=True) + _MARGIN
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        above = (fixed + middle).sigmoid().sum(dim=1, keepdim=True) > total
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    shift = (low + high) / 2
    mask = (score + shift).sigmoid()
    slope = (mask * (1 - mask)).detach().sum(dim=1, keepdim=True)
    left = (mask.sum(dim=1, keepdim=True) - total) / slope.clamp(min=torch.finfo(score.dtype).tiny)
    return (score + shift - left).sigmoid()
