"""What `cover_select` means, in plain torch: all gains a step, or those that may be the best."""

import torch
from torch import Tensor

from vispress_kernels.assign_nearest.reference import first_equal, unit_rows
from vispress_kernels.products import fits, gram, samples_together

AT_A_TIME = 64
"""Tokens whose gains are computed together where not all are."""
FEW = 1024
"""Tokens of a sample up to which a host computes all gains in each step."""


def cover_select_reference(x: Tensor, fit: Tensor, num_keep: int) -> tuple[Tensor, Tensor]:
    """Tokens in the order taken, and the gain of each; some samples at a time."""
    N, D = x.shape[1:]
    if not fits(N, D) or (N > FEW and not x.is_cuda):
        at_a_time, choose = 1, _by_bounds
    else:
        at_a_time, choose = samples_together(x), _by_all
    unit = unit_rows(x)
    fit = fit.to(unit.dtype)
    found = [
        choose(own, one, num_keep)
        for own, one in zip(torch.split(unit, at_a_time), torch.split(fit, at_a_time), strict=True)
    ]
    order, gains = zip(*found, strict=True)
    return torch.cat(order), torch.cat(gains)


def _by_all(tokens: Tensor, fit: Tensor, num_keep: int) -> tuple[Tensor, Tensor]:
    B, N, _ = tokens.shape
    first = first_equal(tokens) == torch.arange(N, device=tokens.device)
    # [b, x, y]: similarity of x to y or to the closest taken token, whichever is higher. A product
    # may round equal tokens differently: later ones cover nothing, and wait until the first is in
    reach = gram(tokens).add_(1).div_(2).mul_(first[:, None]).clamp_(min=0)
    best, apart = torch.zeros_like(reach[..., :1]), torch.empty_like(reach)
    order = torch.empty(B, num_keep, dtype=torch.int64, device=tokens.device)
    gains = reach.new_empty(B, num_keep)
    for k in range(num_keep):
        gain = torch.sub(reach, best, out=apart).sum(dim=1).add_(fit)
        gain.scatter_(1, order[:, :k], float("-inf"))
        # of equals the first; a NaN, which counts as the highest, is in all gains of its sample
        torch.max(gain, dim=1, keepdim=True, out=(gains[:, k : k + 1], order[:, k : k + 1]))
        pick = order[:, k : k + 1, None].expand(-1, N, -1)
        torch.maximum(reach, torch.gather(reach, 2, pick, out=best), out=reach)
    return order, gains


def _by_bounds(tokens: Tensor, fit: Tensor, num_keep: int) -> tuple[Tensor, Tensor]:
    """The same for one sample, by gains of before as bounds."""
    tokens, fit, N = tokens[0], fit[0], tokens.shape[1]
    held = gram(tokens[None])[0] if fits(*tokens.shape) else None
    place = torch.arange(N, device=tokens.device)
    first = first_equal(tokens[None])[0] == place
    best = torch.zeros_like(fit)  # similarity of each token to the closest taken one

    def similar(some: Tensor) -> Tensor:
        cosine = tokens[some] @ tokens.mT if held is None else held[some]
        return cosine.add_(1).div_(2).mul_(first[some, None]).clamp_(min=0)

    def gains_of(some: Tensor) -> Tensor:
        return similar(some).sub_(best).clamp_(min=0).sum(dim=1) + fit[some]

    gain = torch.cat([gains_of(some) for some in torch.split(place, AT_A_TIME)])
    if bool(gain.isnan().any()):  # it is in all gains
        return place[None, :num_keep], gain[None, :num_keep]
    order: list[Tensor] = []
    gains: list[Tensor] = []
    none = float("-inf")
    while len(order) < num_keep:
        bound, fresh = gain.clone(), torch.full_like(gain, none)
        while float(top := bound.max()) > none and float(top) >= float(fresh.max()):
            some = bound.topk(min(AT_A_TIME, N)).indices
            some = some[bound[some] > none]
            fresh[some] = gain[some] = gains_of(some)
            bound[some] = none
        pick = fresh.argmax()  # of equals the first
        order.append(pick)
        gains.append(fresh[pick])
        best = torch.maximum(best, similar(pick[None])[0])
        gain[pick] = none
    return torch.stack(order)[None], torch.stack(gains)[None]
