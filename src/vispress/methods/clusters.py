"""Density-peak clustering (DPC-KNN) of tokens, with index order where noise would break ties."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.methods.base import descending


def dpc_scores(
    x: Float[Tensor, "B n D"],
    neighbours: int,
    noise: Float[Tensor, "B n"] | None = None,
    *,
    block: int = 1024,
) -> tuple[Float[Tensor, "B n"], Float[Tensor, "B n"]]:
    """Density of each token, and its distance to the nearest denser one.

    Distances are Euclidean over `sqrt(D)`. Density is `exp(-mean d^2)` over the nearest tokens,
    itself included; of equals the earlier one is denser. The densest gets the largest distance.

    Args:
        x: Tokens, at least fp32.
        neighbours: How many, at most n.
        noise: Added to the density, where official code draws some.
        block: Rows of the distance matrix that exist at a time.
    """
    n = x.shape[1]
    nearest = [
        rows.topk(min(neighbours, n), dim=2, largest=False).values for rows in _distances(x, block)
    ]
    density = torch.cat(nearest, dim=1).square().mean(dim=2).neg().exp()
    density = density if noise is None else density + noise
    largest = torch.stack([rows.amax(dim=(1, 2)) for rows in _distances(x, block)]).amax(dim=0)
    place, parts, start = torch.arange(n, device=x.device), [], 0
    for rows in _distances(x, block):
        own = slice(start, start + rows.shape[1])
        here, there = density[:, own, None], density[:, None]
        denser = (there > here) | ((there == here) & (place < place[own, None]))
        parts.append(torch.where(denser, rows, largest[:, None, None]).amin(dim=2))
        start = own.stop
    return density, torch.cat(parts, dim=1)


def dpc_clusters(
    x: Float[Tensor, "B n D"],
    count: int,
    noise: Float[Tensor, "B n"] | None = None,
    *,
    neighbours: int | None = None,
) -> tuple[Int[Tensor, "B C"], Int[Tensor, "B n"]]:
    """Centres (the highest density times distance first) and the nearest centre of each token.

    Args:
        x: Tokens, at least fp32.
        count: Clusters, C; n at most.
        noise: As in `dpc_scores`.
        neighbours: Tokens that a density looks at; as many as clusters, when left out.
    """
    density, distance = dpc_scores(x, neighbours or count, noise)
    centres = descending(density * distance)[:, :count]
    rows = torch.arange(len(x), device=x.device)[:, None]
    label = _distance(x, x[rows, centres]).argmin(dim=2)
    own = torch.arange(centres.shape[1], device=x.device).expand_as(centres)
    return centres, label.scatter(1, centres, own)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    # not by a matrix product: equal tokens must be at distance 0
    exact: Tensor = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    scaled: Tensor = exact / a.shape[-1] ** 0.5
    return scaled


def _distances(x: Tensor, block: int) -> Iterator[Tensor]:
    """Rows of the distance matrix, `[B, block, n]` at a time."""
    for rows in torch.split(x, block, dim=1):
        yield _distance(rows, x)
