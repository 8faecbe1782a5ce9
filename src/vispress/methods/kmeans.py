"""K-means of tokens by cosine: seeded, without empty clusters, without a device sync."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from vispress.methods.base import descending
from vispress.methods.diversity import unit

ROUNDS = 10


def kmeans(x: Float[Tensor, "b n D"], count: int, seed: int) -> Int[Tensor, "b n"]:
    """Cluster of each token, every cluster with at least one.

    k-means++ starts; an empty cluster starts again at the token farthest from its own centre. The
    random numbers are those of the seed, the same for every image.

    Args:
        x: Tokens, any length; compared by cosine.
        count: Clusters, from 1 to n.
        seed: Of a generator of its own on the host.
    """
    tokens = unit(x)
    centres = _starts(tokens, count, seed)
    for _ in range(ROUNDS):
        cosine, label = (tokens @ centres.mT).max(dim=2)
        members = F.one_hot(label, count).to(tokens)
        empty = members.sum(dim=1) == 0
        farthest = descending(-cosine)[:, :count]
        number = (empty.long().cumsum(dim=1) - 1).clamp(min=0)
        again = _take(tokens, farthest.gather(1, number))
        centres = torch.where(empty[..., None], again, unit(members.mT @ tokens))
    cosine, label = (tokens @ centres.mT).max(dim=2)
    return _filled(label, cosine, count)


def _starts(tokens: Tensor, count: int, seed: int) -> Tensor:
    """k-means++: each start is drawn in proportion to the squared distance from those before."""
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    n = tokens.shape[1]
    first = min(n - 1, int(drawn[0] * n))
    picks = [torch.full_like(tokens[:, :1, 0], first, dtype=torch.int64)]
    distance = torch.full_like(tokens[..., 0], float("inf"))
    for part in drawn[1:]:
        near = (tokens * _take(tokens, picks[-1])).sum(dim=2)
        distance = torch.minimum(distance, (1 - near).clamp(min=0))
        mass = distance.square().cumsum(dim=1)
        picks.append(torch.searchsorted(mass, mass[:, -1:] * part, right=True).clamp(max=n - 1))
    return _take(tokens, torch.cat(picks, dim=1))


def _filled(label: Tensor, cosine: Tensor, count: int) -> Tensor:
    """Give each empty cluster the token farthest from its centre, where one can be spared."""
    sizes = F.one_hot(label, count).sum(dim=1)
    for cluster in range(count):
        spare = sizes.gather(1, label) > 1
        token = cosine.masked_fill(~spare, float("inf")).argmin(dim=1, keepdim=True)
        moved = (sizes[:, cluster : cluster + 1] == 0).long()
        old = label.gather(1, token)
        label = label.scatter(1, token, torch.where(moved > 0, cluster, old))
        sizes = sizes.scatter_add(1, old, -moved)
        sizes[:, cluster : cluster + 1] += moved
    return label


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
