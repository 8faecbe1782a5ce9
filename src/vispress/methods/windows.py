"""Windows of sub-images and what is kept of each, and folding of the rest: parts of VScan."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.methods.base import descending
from vispress.types import TokenPlan, VisualTokens

WINDOWS = 4
"""Windows along each side of a sub-image."""


def windows(tokens: VisualTokens) -> Int[Tensor, "B N"]:
    """Window of each token in its sub-image or frame, of 4 x 4; -1 for newlines."""
    if tokens.crops is not None:
        segment, row, col = tokens.crops.segment, tokens.crops.row, tokens.crops.col
    else:
        _, h, w = tokens.grid or (1, 1, tokens.num_original)
        place = torch.arange(tokens.num_original)
        segment, row, col = place // (h * w), place % (h * w) // w, place % w
    window = torch.full_like(segment, -1)
    for each in torch.unique(segment[segment >= 0]).tolist():
        own = segment == each
        r, c = (x[own] * WINDOWS // (int(x[own].max()) + 1) for x in (row, col))
        window[own] = r * WINDOWS + c
    return window.to(tokens.index.device)[tokens.index]


def scan(
    local: Float[Tensor, "b n"],
    whole: Float[Tensor, "b n"],
    window: Int[Tensor, "b n"],
    num_keep: int,
) -> Int[Tensor, "b K"]:
    """Half of the tokens by local score, equally many a window; the others by the global one."""
    share, chosen = num_keep // 2 // WINDOWS**2, torch.zeros_like(local, dtype=torch.bool)
    for each in range(WINDOWS**2):
        inside = window == each
        rank = descending(local.masked_fill(~inside, float("-inf"))).argsort(dim=1)
        chosen = chosen | (inside & (rank < share))
    best = descending(whole)
    later = (~chosen).gather(1, best).to(torch.int8)
    return best.gather(1, later.argsort(dim=1, stable=True))[:, :num_keep].sort(dim=1).values


def fold(owner: Int[Tensor, "B N"], num_keep: int) -> TokenPlan:
    """The plan that puts the mean of all tokens with one owner at the owner's place (-1: none)."""
    place = torch.arange(owner.shape[1], device=owner.device)
    survives = owner == place
    keep = (~survives).to(torch.int8).argsort(dim=1, stable=True)[:, :num_keep]
    into, folded = owner.clamp(min=0), (owner >= 0).long()
    members = torch.zeros_like(owner).scatter_add(1, into, folded).gather(1, into)
    assign = (survives.cumsum(dim=1) - 1).gather(1, into).where(owner >= 0, -1)
    return TokenPlan(keep=keep, assign=assign, weight=1 / members.clamp(min=1).float())
