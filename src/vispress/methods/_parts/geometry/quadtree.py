"""Quadtrees over a grid of tokens: which cells are alike enough to be merged, and into what."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from vispress.devices import sent
from vispress.methods._parts.scoring.cosines import unit
from vispress_kernels.maxmin_select.reference import zero_distance


@dataclass(frozen=True)
class Tree:
    """Cells of 2^l x 2^l tokens, level by level in raster order, the root last; on the host.

    Those at the edges may hold fewer tokens.

    Args:
        present: `[h, w, 4]` for each level: which children its cells have.
        children: `[C]`; how many that are, 1 to 4.
        cell: `[L, n]`; cell of each token at each level.
        first: `[L, n]`; first token of that cell.
        parts: `[L, n]`; children of that cell.
    """

    present: tuple[Bool[Tensor, "_ _ 4"], ...]
    children: Int[Tensor, "C"]
    cell: Int[Tensor, "L n"]
    first: Int[Tensor, "L n"]
    parts: Int[Tensor, "L n"]


@lru_cache(maxsize=64)
def tree_of(size: tuple[int, int]) -> Tree:
    """Build all levels above the single tokens of a grid of more than one."""
    (h, w), side, start = size, 1, 0
    row = torch.arange(h, device="cpu").repeat_interleave(w)
    col = torch.arange(w, device="cpu").repeat(h)
    present, cell, first = [], [], []
    while max(h, w) > 1:
        present.append(_quarters(torch.ones(1, h, w, 1, device="cpu"))[0, ..., 0] > 0)
        h, w, side = *present[-1].shape[:2], 2 * side
        cell.append(start + row // side * w + col // side)
        first.append((row // side * size[1] + col // side) * side)
        start += h * w
    children, cells = torch.cat([own.sum(dim=-1).flatten() for own in present]), torch.stack(cell)
    return Tree(tuple(present), children, cells, torch.stack(first), children[cells])


def costs(x: Float[Tensor, "b n D"], size: tuple[int, int]) -> Float[Tensor, "b C"]:
    """Compute the largest cosine distance between two children anywhere in each cell."""
    mean, found = x.view(len(x), *size, x.shape[-1]), list[Tensor]()
    for present in tree_of(size).present:
        parts = _quarters(mean)
        towards = unit(parts)
        alike = towards @ towards.mT
        if odd := mean.shape[1] % 2 or mean.shape[2] % 2:
            present = sent(present, x.device)
            pairs = present[..., None] & present[..., None, :]
            alike = alike.masked_fill(~pairs, 1.0)
        distance = 1 - alike.amin(dim=(-2, -1))
        cost = F.threshold(distance, zero_distance(distance.dtype), 0.0)
        if found:
            cost = torch.maximum(cost, F.max_pool2d(found[-1], 2, ceil_mode=True))
        found.append(cost)
        mean = parts.sum(dim=-2) / (present.sum(dim=-1, keepdim=True) if odd else 4)
    return torch.cat([cost.flatten(1) for cost in found], dim=1)


def _quarters(x: Tensor) -> Tensor:
    """View `[b, h, w, D]` as `[b, h', w', 4, D]`, zeros where a cell has no child."""
    h, w = x.shape[1:3]
    if h % 2 or w % 2:
        x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2))
    b, h, w, d = x.shape
    return x.view(b, h // 2, 2, w // 2, 2, d).movedim(2, 3).flatten(3, 4)


def merged_cells(
    cost: Float[Tensor, "b C"], tree: Tree, num_keep: Int[Tensor, "b"], theta: float, depth: int
) -> Bool[Tensor, "b C"]:
    """Choose the cells that are merged; a cell never is before all of its parts.

    Args:
        cost: As `costs` gives it.
        tree: The cells.
        num_keep: The most that may be left of each row: the cheapest cells are merged until it is
            met.
        theta: Cells that cost less are merged in any case.
        depth: Levels for which that holds.
    """
    chosen = cost < theta
    if depth < len(tree.cell):
        chosen[:, int(tree.cell[depth, 0]) :] = False  # the first cell that is too large
    # levels ascend, and a cell costs no less than its parts: of equals the parts come first
    order = cost.argsort(dim=1, stable=True)
    gone = sent(tree.children - 1, cost.device)[order]
    needed = gone.cumsum(dim=1) - gone < (tree.cell.shape[1] - num_keep)[:, None]
    return chosen | torch.empty_like(chosen).scatter(1, order, needed)


def average_linkage(
    distance: Float[Tensor, "*B m m"], theta: float, active: Bool[Tensor, "*B m"] | None = None
) -> Int[Tensor, "*B m"]:
    """Cluster a few items agglomeratively, by the mean distance between members of two clusters.

    Args:
        distance: Symmetric.
        theta: Clusters that are at most so far apart are joined, the nearest first.
        active: Items that take part; None for all.

    Returns:
        The first item of each one's cluster; itself where it takes no part.
    """
    m = distance.shape[-1]
    number = torch.arange(m, device=distance.device)
    pairs = number[:, None] < number
    if active is not None:
        pairs = pairs & active[..., None] & active[..., None, :]
    label = number.expand(distance.shape[:-1])
    for _ in range(m - 1):
        member = F.one_hot(label, m).to(distance)
        size = member.sum(dim=-2)  # 0 but for first items
        both = size[..., None] * size[..., None, :]
        mean = member.mT @ distance @ member / both.clamp(min=1)
        near, pair = mean.where(pairs & (both > 0), float("inf")).flatten(-2).min(dim=-1)
        joins = (near <= theta)[..., None] & (label == (pair % m)[..., None])
        label = torch.where(joins, (pair // m)[..., None], label)
    return label


def linked_cells(
    x: Float[Tensor, "b n D"], size: tuple[int, int], theta: float, depth: int
) -> tuple[Int[Tensor, "b n"], Float[Tensor, "b n"]]:
    """Merge the parts of cells by average linkage, level by level, of parts that are one token.

    Returns:
        The token that each one goes to, and its weight there.
    """
    (h, w), batch = size, len(x)
    row = torch.arange(h, device=x.device).repeat_interleave(w)
    col = torch.arange(w, device=x.device).repeat(h)
    owner = torch.arange(h * w, device=x.device).repeat(batch, 1)
    weight = torch.ones(owner.shape, device=x.device)
    mean, whole, half = x.view(batch, h, w, -1), x.new_ones(batch, h, w, 1), 1
    for present in tree_of(size).present[:depth]:
        there = sent(present, x.device)
        parts, one = _quarters(mean), _quarters(whole)[..., 0] > 0
        towards = unit(parts)
        distance = 1 - towards @ towards.mT
        distance = F.threshold(distance, zero_distance(distance.dtype), 0.0)
        label = average_linkage(distance, theta, one)
        members = F.one_hot(label, 4).sum(dim=-2).gather(-1, label)
        # of each token: its cell, its part of the cell, and the part that this one joins
        cell = (slice(None), row // (2 * half), col // (2 * half))
        part = (row // half % 2 * 2 + col // half % 2).expand(batch, -1)[..., None]
        into = label[cell].gather(-1, part)[..., 0]
        first = (row // (2 * half) * 2 + into // 2) * half * w
        first = first + (col // (2 * half) * 2 + into % 2) * half
        merged = one[cell].gather(-1, part)[..., 0]
        owner = torch.where(merged, first, owner)
        weight = torch.where(merged, weight / members[cell].gather(-1, part)[..., 0], weight)
        mean = parts.sum(dim=-2) / there.sum(dim=-1, keepdim=True)
        alike = (label == 0) & one | ~there
        whole, half = alike.all(dim=-1, keepdim=True).to(x), 2 * half
    return owner, weight
