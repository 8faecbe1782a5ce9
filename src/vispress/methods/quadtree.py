"""Quadtrees over a grid of tokens: which cells are alike enough to be merged, and into what."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from vispress.devices import sent
from vispress.methods.diversity import unit
from vispress_kernels.maxmin_select.reference import zero_distance


@dataclass(frozen=True)
class Level:
    """Cells of 2^l x 2^l tokens, in raster order; those at the edges may hold fewer.

    Args:
        cost: `[b, c]`; largest cosine distance between two children anywhere in the cell.
        children: `[c]`; how many there are, 1 to 4.
        cell: `[n]`; cell of each token.
        first: `[c]`; first token of each cell.
    """

    cost: Float[Tensor, "b c"]
    children: Int[Tensor, "c"]
    cell: Int[Tensor, "n"]
    first: Int[Tensor, "c"]


def levels(x: Float[Tensor, "b n D"], size: tuple[int, int]) -> list[Level]:
    """All levels above single tokens, the root last."""
    return list(_levels(x, size))


def _levels(x: Tensor, size: tuple[int, int]) -> Iterator[Level]:
    (h, w), side, device = size, 1, x.device
    row, col = (part.flatten() for part in torch.meshgrid(*map(torch.arange, size), indexing="ij"))
    mean = x.view(len(x), *size, x.shape[-1])
    cost = x.new_zeros(x.shape[0], h, w)
    while max(h, w) > 1:
        present = _quarters(torch.ones(1, h, w, 1, device=device))[..., 0] > 0  # [1, H, W, 4]
        parts = _quarters(mean)
        alike = unit(parts) @ unit(parts).mT
        pairs = present[..., None] & present[..., None, :]
        distance = (1 - alike).masked_fill(~pairs, 0.0).amax(dim=(-2, -1))
        distance = distance.masked_fill(distance <= zero_distance(distance.dtype), 0.0)
        below = _quarters(cost[..., None])[..., 0].amax(dim=-1)
        cost, count = torch.maximum(distance, below), present.sum(dim=-1)
        mean = parts.sum(dim=-2) / count[..., None].to(parts)
        h, w, side = cost.shape[1], cost.shape[2], 2 * side
        cell = row // side * w + col // side
        first = (torch.arange(h)[:, None] * side * size[1] + torch.arange(w) * side).flatten()
        yield Level(cost.flatten(1), count.flatten(), sent(cell, device), sent(first, device))


def _quarters(x: Tensor) -> Tensor:
    """`[b, h, w, D]` to `[b, h', w', 4, D]`, zeros where a cell has no child."""
    h, w = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2))
    b, h, w, d = x.shape
    return x.view(b, h // 2, 2, w // 2, 2, d).movedim(2, 3).flatten(3, 4)


def merged_cells(
    tree: list[Level], num_keep: int, theta: float, depth: int
) -> list[Bool[Tensor, "b c"]]:
    """Which cells of each level are merged; a cell never is before all of its parts.

    Args:
        tree: As `levels` gives it.
        num_keep: The most that may be left: the cheapest cells are merged until it is met.
        theta: Cells that cost less are merged in any case.
        depth: Levels for which that holds.
    """
    cost = torch.cat([level.cost for level in tree], dim=1)
    gone = torch.cat([level.children - 1 for level in tree])
    wanted = torch.cat([(at.cost < theta) & (i < depth) for i, at in enumerate(tree)], dim=1)
    # levels ascend, and a cell costs no less than its parts: of equals the parts come first
    order = cost.argsort(dim=1, stable=True)
    before = gone[order].cumsum(dim=1) - gone[order]
    needed = len(tree[0].cell) - before > num_keep
    chosen = wanted | torch.zeros_like(wanted).scatter(1, order, needed)
    return list(torch.split(chosen, [level.cost.shape[1] for level in tree], dim=1))
