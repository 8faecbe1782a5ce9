"""Cosines between tokens, for methods that compare them; no N x N matrix is ever whole."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional as F

from vispress.methods.base import upcast

MOST_PAIRS = 1 << 22
"""Pairs of an image's tokens that are compared at a time, unless one run has more."""


def unit(x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
    """Scale tokens to length 1, in at least fp32; zero tokens stay zero."""
    return F.normalize(upcast(x), dim=-1)


def largest_cosine(
    x: Float[Tensor, "B N D"], others: Float[Tensor, "B M D"], *, block: int = 1024
) -> Float[Tensor, "B N"]:
    """Compute each unit token's cosine to the most similar other, `block` rows at a time."""
    return torch.cat([(b @ others.mT).amax(dim=2) for b in torch.split(x, block, dim=1)], dim=1)


def equal_runs(x: Float[Tensor, "b n *d"], runs: int) -> list[Float[Tensor, "_ _ *d"]]:
    """Cut runs as `tensor_split`, in order, those of one length as rows together unless large."""
    length, longer = divmod(x.shape[1], runs)
    split = longer * (length + 1)
    return [
        together.flatten(0, 1)
        for part, m in ((x[:, :split], length + 1), (x[:, split:], length))
        if part.shape[1]
        for together in torch.split(
            part.view(len(x), -1, m, *x.shape[2:]), max(1, MOST_PAIRS // m**2), dim=1
        )
    ]


def side_by_side(parts: list[Shaped[Tensor, "_ ..."]], batch: int) -> Shaped[Tensor, "b n"]:
    """Put values of runs, or of their tokens, into a row an image, as `equal_runs` orders them."""
    return torch.cat([part.view(batch, -1) for part in parts], dim=1)
