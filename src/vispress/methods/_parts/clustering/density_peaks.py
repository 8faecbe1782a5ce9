"""Density-peak clustering (DPC-KNN) of tokens, with index order where noise would break ties."""

from collections.abc import Iterator
from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.methods.base import descending

BLOCK = 1024
"""Rows of a distance matrix that exist at a time."""


def dpc_scores(
    x: Float[Tensor, "B n D"],
    neighbours: int,
    noise: Float[Tensor, "B n"] | None = None,
    *,
    block: int = BLOCK,
) -> tuple[Float[Tensor, "B n"], Float[Tensor, "B n"]]:
    """Measure each token's density, and its distance to the nearest denser one.

    Distances are Euclidean over `sqrt(D)`. Density is `exp(-mean d^2)` over the nearest tokens,
    itself included; of equals the earlier one is denser. The densest gets the largest distance.

    Args:
        x: Tokens, at least fp32.
        neighbours: How many, at most n.
        noise: Added to the density, where official code draws some.
        block: Rows of the distance matrix that exist at a time.
    """
    return _scores(_Distances(x, block), neighbours, noise)


def _scores(
    distances: "_Distances", neighbours: int, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    n, device = distances.x.shape[1], distances.x.device
    nearest = [rows.topk(min(neighbours, n), dim=2, largest=False).values for rows in distances]
    density = _joined(nearest).square().mean(dim=2).neg().exp()
    density = density if noise is None else density + noise
    largest = reduce(torch.maximum, (rows.amax(dim=(1, 2), keepdim=True) for rows in distances))
    place, parts, start = torch.arange(n, device=device), [], 0
    for rows in distances:
        own = slice(start, start + rows.shape[1])
        here, there = density[:, own, None], density[:, None]
        denser = torch.where(place < place[own, None], there >= here, there > here)
        parts.append(torch.where(denser, rows, largest).amin(dim=2))
        start = own.stop
    return density, _joined(parts)


def dpc_clusters(
    x: Float[Tensor, "B n D"],
    count: int,
    noise: Float[Tensor, "B n"] | None = None,
    *,
    neighbours: int | None = None,
) -> tuple[Int[Tensor, "B C"], Int[Tensor, "B n"]]:
    """Find centres (highest density times distance first), and each token's nearest one.

    Args:
        x: Tokens, at least fp32.
        count: Clusters, C; n at most.
        noise: As in `dpc_scores`.
        neighbours: Tokens that a density looks at; as many as clusters, when left out.
    """
    distances = _Distances(x, BLOCK)
    density, distance = _scores(distances, neighbours or count, noise)
    centres = descending(density * distance)[:, :count]
    own = torch.arange(centres.shape[1], device=x.device).expand(len(x), -1)
    return centres, distances.to(centres).argmin(dim=2).scatter_(1, centres, own)


class _Distances:
    """Rows of the distance matrix, `[B, block, n]` at a time; held where these are all."""

    def __init__(self, x: Tensor, block: int) -> None:
        self.x, self.block = x, block
        self.held = [_distance(x, x)] if x.shape[1] <= block else None

    def __iter__(self) -> Iterator[Tensor]:
        parts = torch.split(self.x, self.block, dim=1)
        return iter(self.held or (_distance(rows, self.x) for rows in parts))

    def to(self, tokens: Tensor) -> Tensor:
        """Give the distances `[B, n, C]` of all tokens to those at `[B, C]`."""
        if self.held is None:
            width = self.x.shape[2]
            return _distance(self.x, self.x.gather(1, tokens[..., None].expand(-1, -1, width)))
        return self.held[0].gather(2, tokens[:, None].expand(-1, self.x.shape[1], -1))


def _distance(a: Tensor, b: Tensor) -> Tensor:
    # not by a matrix product: equal tokens must be at distance 0
    exact: Tensor = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    scaled: Tensor = exact / a.shape[-1] ** 0.5
    return scaled


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
