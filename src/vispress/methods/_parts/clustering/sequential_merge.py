"""Dropped tokens averaged one after another into what is kept: the inner stage of HoliTom."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.types import TokenPlan
from vispress_kernels import Backend
from vispress_kernels.assign_nearest import assign_nearest


@torch.no_grad()
def sequential_merge(
    x: Float[Tensor, "B N D"], keep: Int[Tensor, "B K"], backend: Backend = "auto"
) -> TokenPlan:
    """The plan in which each dropped token, in order, is averaged into the kept one nearest to it.

    `kept = (kept + dropped) / 2` for each: the last of m dropped tokens weighs 1/2, the kept token
    itself `2 ** -m`. Nearest is by cosine, of the tokens as they were.
    """
    rows = torch.arange(len(x), device=x.device)[:, None]
    slot, _ = assign_nearest(x, x[rows, keep], backend=backend)
    number = torch.arange(keep.shape[1], device=x.device).expand_as(keep)
    slot = slot.scatter(1, keep, number)
    dropped = torch.ones_like(slot).scatter(1, keep, 0)
    count = torch.zeros_like(keep).scatter_add(1, slot, dropped)
    # place of each token among those of its slot: the kept one first, then the dropped in order
    order = (2 * slot + dropped).argsort(dim=1, stable=True)
    start = (count + 1).cumsum(dim=1) - (count + 1)
    place = torch.arange(x.shape[1], device=x.device) - start.gather(1, slot.gather(1, order))
    rank = torch.zeros_like(slot).scatter(1, order, place)
    left = count.gather(1, slot) - (rank - 1).clamp(min=0)
    return TokenPlan(keep=keep, assign=slot, weight=torch.exp2(-left.float()))
