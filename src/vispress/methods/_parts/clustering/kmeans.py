"""K-means of tokens by cosine: seeded, without empty clusters, without a device sync."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.devices import sent
from vispress.methods._parts.scoring.cosines import unit
from vispress_kernels.kmeans_starts import kmeans_starts

ROUNDS = 10


def kmeans(x: Float[Tensor, "b n D"], count: int, seed: int) -> Int[Tensor, "b n"]:
    """Cluster tokens, with at least one in every cluster.

    k-means++ starts; an empty cluster starts again at the token farthest from its own centre. The
    random numbers are those of the seed, the same for every image.

    Args:
        x: Tokens, any length; compared by cosine.
        count: Clusters, from 1 to n.
        seed: Of a generator of its own on the host.
    """
    tokens = unit(x)
    centres = _starts(tokens, count, seed)
    clusters = torch.arange(count, device=x.device)
    for _ in range(ROUNDS):
        cosine, label = (tokens @ centres.mT).max(dim=2)
        member = label[..., None] == clusters
        filled = member.any(dim=1)
        farthest = cosine.argsort(dim=1, stable=True)[:, :count]
        number = (clusters - filled.cumsum(dim=1)).clamp(min=0)  # of empty ones before
        again = take(tokens, farthest.gather(1, number))
        centres = torch.where(filled[..., None], unit(member.to(tokens).mT @ tokens), again)
    cosine, label = (tokens @ centres.mT).max(dim=2)
    return _filled(label, cosine, count)


def _starts(tokens: Tensor, count: int, seed: int) -> Tensor:
    """Draw starts (k-means++) in proportion to the squared distance from those before."""
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.rand(count, generator=generator, dtype=torch.float64)
    return take(tokens, kmeans_starts(tokens, sent(drawn, tokens.device)))


def _filled(label: Tensor, cosine: Tensor, count: int) -> Tensor:
    """Give each empty cluster the token farthest from its centre, where one can be spared.

    A cluster spares its farthest tokens first and keeps one.
    """
    order = cosine.neg().argsort(dim=1, descending=True, stable=True)  # NaN, then the farthest
    own = label.gather(1, order)
    place = torch.arange(label.shape[1], device=label.device).expand_as(own)
    nearest = label.new_full((len(label), count), -1).scatter_reduce(1, own, place, "amax")
    spare = place != nearest.gather(1, own)
    number = spare.cumsum(dim=1)
    empty_first = nearest.argsort(dim=1, stable=True)
    moved = spare & (number <= (nearest < 0).sum(dim=1, keepdim=True))
    into = empty_first.gather(1, (number - 1).clamp(0, count - 1))
    return torch.empty_like(label).scatter(1, order, torch.where(moved, into, own))


def take(x: Float[Tensor, "b n D"], index: Int[Tensor, "b k"]) -> Float[Tensor, "b k D"]:
    """Take the tokens at the indices of each row."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
