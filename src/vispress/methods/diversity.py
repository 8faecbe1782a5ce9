"""Cosines between tokens, for methods that compare them; no N x N matrix is ever whole."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from vispress.methods.base import upcast


def unit(x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
    """Tokens at length 1, in at least fp32; zero tokens stay zero."""
    return F.normalize(upcast(x), dim=-1)


def largest_cosine(
    x: Float[Tensor, "B N D"], others: Float[Tensor, "B M D"], *, block: int = 1024
) -> Float[Tensor, "B N"]:
    """Cosine of each unit token to the most similar of the others, `block` rows at a time."""
    return torch.cat([(b @ others.mT).amax(dim=2) for b in torch.split(x, block, dim=1)], dim=1)
