"""The text that a text-guided method compares visual tokens with, in the LLM's embedding space."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from vispress.methods._parts.scoring.cosines import unit
from vispress.methods.base import remembered, upcast
from vispress.types import VisualTokens


def question(tokens: VisualTokens) -> Float[Tensor, "B T D"]:
    """Select the text behind the image, or all text where none follows; T may be 0."""
    assert tokens.text_embeddings is not None  # declared in `reads`
    return tokens.text_embeddings[:, -tokens.text_after :]  # -0: all of them


def mean_cosine(x: Float[Tensor, "B N D"], texts: Float[Tensor, "B T D"]) -> Float[Tensor, "B N"]:
    """Average each token's cosine over texts, in at least fp32; 0 without texts.

    Reduced token by token, not by a matrix product, so that equal tokens tie.
    """
    mean = unit(texts).sum(dim=1, keepdim=True) / max(1, texts.shape[1])
    return (unit(x) * mean).sum(dim=-1)


def scaled(
    score: Float[Tensor, "B N"], *, counted: Tensor | None = None, eps: float = 0.0
) -> Float[Tensor, "B N"]:
    """Scale by min and max of the counted tokens of an image: `(s - min + eps) / (max - min)`.

    Args:
        score: Any range.
        counted: `[B, N]` bool; others (newlines) get a value, but do not set the scale. None: all.
        eps: Keeps the lowest above 0.

    Returns:
        1 for all where the range is within rounding of 0.
    """
    score = upcast(score)
    if counted is None:
        low, high = score.aminmax(dim=1, keepdim=True)
    else:
        low = torch.where(counted, score, float("inf")).amin(dim=1, keepdim=True)
        high = torch.where(counted, score, float("-inf")).amax(dim=1, keepdim=True)
    spread = high - low
    flat = spread <= 1e-6 * torch.maximum(high, -low)  # the larger of both sizes
    above = score - low + eps if eps else score - low
    return (above / spread.masked_fill_(flat, 1.0)).masked_fill_(flat, 1.0)


def quantile(score: Float[Tensor, "B N"], q: float) -> Float[Tensor, "B 1"]:
    """Compute `torch.quantile` in fewer calls: NaN is in all or in none here."""
    rank, ordered = _rank(q, score.shape[1], score.dtype), score.sort(dim=1).values
    below, above = (ordered[:, int(at) : int(at) + 1] for at in (rank, math.ceil(rank)))
    return below.lerp(above, rank - int(rank))


@remembered
def _rank(q: float, count: int, dtype: torch.dtype) -> float:
    return float(torch.tensor(q, dtype=dtype) * (count - 1))
