"""Greedy coverage of rows by tokens: each pick adds most to what the picked ones cover.

A row is covered as far as the picked token that covers it most does: `sum_r max_y reach(y, r)`.
What all tokens cover of all rows is held up to 4,096 tokens. Beyond, memory is O(N D): a gain never
grows, so those of before are bounds, and only tokens that may still be the best are looked at
again; that waits for the device.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress_kernels.assign_nearest.reference import first_equal
from vispress_kernels.products import fits, samples_together

Reach = Callable[[slice, Tensor | None], Float[Tensor, "b s R"]]
"""What tokens of these samples cover of each row: of those at `[s]` (one sample), or of all."""
AT_A_TIME = 64
"""Tokens whose gains are computed together where not all are."""


def greedy_cover(
    reach: Reach,
    tokens: Float[Tensor, "B N D"],
    weight: Float[Tensor, "B N"],
    fit: Float[Tensor, "B N"],
    num_keep: int,
) -> Int[Tensor, "B K"]:
    """Choose tokens one by one by what each covers beyond the others, times `weight`, plus `fit`.

    Of equals the earlier is taken; a token that equals a taken one covers nothing more.

    Args:
        reach: What counts is above 0. Each call gives tensors of its own.
        tokens: Those that cover; equal ones cover alike.
        weight: At least 0.
        fit: What a token brings beside its coverage.
        num_keep: K, in the order taken.
    """
    B, N, D = tokens.shape
    at_a_time, choose = (samples_together(tokens), _by_all) if fits(N, D) else (1, _by_bounds)
    found = []
    for start in range(0, B, at_a_time):
        own = slice(start, start + at_a_time)
        found.append(
            choose(partial(reach, own), tokens[own], weight[own], fit[own].clone(), num_keep)
        )
    return torch.cat(found)


def _by_all(
    reach: Callable[[None], Tensor], tokens: Tensor, weight: Tensor, fit: Tensor, num_keep: int
) -> Tensor:
    left = reach(None)
    b, _, rows = left.shape
    # products of equal tokens may be rounded differently
    left = left.gather(1, first_equal(tokens)[..., None].expand(-1, -1, rows)).clamp_(min=0)
    order = torch.empty(b, num_keep, dtype=torch.int64, device=left.device)
    for k in range(num_keep):
        gain = torch.addcmul(fit, left.sum(dim=2), weight)
        pick = gain.argmax(dim=1, keepdim=True)  # of equals the first
        order[:, k : k + 1] = pick
        fit.scatter_(1, pick, float("-inf"))
        # what is left to cover, in place of all and what is covered
        left.sub_(left.gather(1, pick[..., None].expand(-1, -1, rows))).clamp_(min=0)
    return order


def _by_bounds(
    reach: Callable[[Tensor], Tensor], tokens: Tensor, weight: Tensor, fit: Tensor, num_keep: int
) -> Tensor:
    """The same for one sample, by gains of before as bounds."""
    twin, places = first_equal(tokens)[0], torch.arange(tokens.shape[1], device=tokens.device)
    best = tokens.new_zeros(())  # of each row, how far it is covered

    def gains_of(some: Tensor) -> Tensor:
        gain = (reach(twin[some])[0] - best).clamp_(min=0).sum(dim=1)
        return torch.addcmul(fit[0, some], gain, weight[0, some])

    gain = torch.cat([gains_of(some) for some in torch.split(places, AT_A_TIME)])
    order: list[Tensor] = []
    none = float("-inf")
    while len(order) < num_keep:
        bound, fresh = gain.clone(), torch.full_like(gain, none)
        while float(top := bound.max()) > none and float(top) >= float(fresh.max()):
            some = bound.topk(min(AT_A_TIME, len(bound))).indices
            some = some[bound[some] > none]
            fresh[some] = gain[some] = gains_of(some)
            bound[some] = none
        pick = fresh.argmax()  # of equals the first
        order.append(pick)
        best = torch.maximum(best, reach(twin[pick[None]])[0, 0])
        gain[pick] = none
    return torch.stack(order)[None]
