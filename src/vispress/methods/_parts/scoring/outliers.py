"""Outliers of a score, and tokens with what their nearest ones hold added: parts of PruMerge."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.methods._parts.scoring.cosines import unit
from vispress.methods.base import descending


def outliers(a: Float[Tensor, "n"]) -> int:
    """How many scores lie above the third quartile by 1.5 interquartile ranges (waits for them)."""
    low, high = a.double().quantile(torch.tensor([0.25, 0.75], device=a.device).double())
    return int((a > high + 1.5 * (high - low)).sum())


def equal_steps(n: int, ratio: float, device: torch.device | str) -> Int[Tensor, "s"]:
    """Places at a third of the mean distance of `ratio * n` tokens, the last token left out."""
    return torch.arange(0, n - 1, max(1, int(int(1 / ratio) / 3)), device=device)


def add_neighbours(
    order: Int[Tensor, "b k"], a: Tensor, keys: Tensor, x: Float[Tensor, "b n d"], neighbours: int
) -> tuple[Float[Tensor, "b k d"], Float[Tensor, "b d"]]:
    """New values of the kept tokens in their order, and the sum of all others."""
    rows = torch.arange(len(x), device=x.device)[:, None]
    similar = (unit(keys)[rows, order] @ unit(keys).mT).scatter(2, order[..., None], float("-inf"))
    near = similar.topk(min(neighbours, x.shape[1] - 1), dim=2).indices
    weighted = a.to(x)[..., None] * x
    left = torch.ones_like(a, dtype=torch.bool).scatter(1, order, False)
    kept = x[rows, order] + weighted[rows[..., None], near].sum(dim=2)
    return kept, (weighted * left[..., None]).sum(dim=1)


@torch.no_grad()
def choose(a: Float[Tensor, "b n"], limit: int, plus: bool, adaptive: bool) -> Int[Tensor, "b k"]:
    """Tokens to keep, the top ones first, at most `limit`.

    Args:
        a: Attention of one row alone where adaptive.
        limit: The most; met exactly unless adaptive.
        plus: Also tokens at equal steps.
        adaptive: Outliers decide the count.
    """
    n, ranked = a.shape[1], descending(a)
    if adaptive:
        ratio = outliers(a[0]) / n
        top = ranked[:, : int(n * ratio)]
        if plus:
            steps = equal_steps(n, max(ratio, 1 / n), a.device)
            top = torch.cat([top, steps[~torch.isin(steps, top)][None]], dim=1)
        return top[:, :limit]
    count = limit // 2 if plus else limit
    rest, wanted = ranked[:, count:].sort(dim=1).values, limit - count
    middle = (2 * torch.arange(wanted, device=a.device) + 1) * (n - count) // (2 * wanted or 1)
    return torch.cat([ranked[:, :count], rest[:, middle]], dim=1)
