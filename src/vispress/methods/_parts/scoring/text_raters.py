"""Raters: the words of the question that are about the picture, and what they attend to."""

from jaxtyping import Bool, Float
from torch import Tensor

from vispress.methods.base import upcast
from vispress.types import VisualTokens


def text_raters(tokens: VisualTokens) -> Bool[Tensor, "B T"]:
    """Choose the words behind the image that are about it more than the mean."""
    assert tokens.text_embeddings is not None  # declared in `reads`, as the image's
    assert tokens.input_embeddings is not None
    words = upcast(tokens.text_embeddings[:, tokens.text_embeddings.shape[1] - tokens.text_after :])
    rating = (upcast(tokens.input_embeddings) @ words.mT).softmax(dim=2).mean(dim=1)
    return rating > rating.mean(dim=1, keepdim=True)


def relation(
    tokens: VisualTokens,
) -> tuple[Float[Tensor, "B N"], Float[Tensor, "B T N"], Bool[Tensor, "B T"]]:
    """Average what raters attend to; also give every word's attention, and who the raters are."""
    assert tokens.query_attention is not None  # declared in `reads`
    rows, chosen = upcast(tokens.query_attention).mean(dim=1), text_raters(tokens)
    total = (rows * chosen[..., None]).sum(dim=1)
    return total / chosen.sum(dim=1, keepdim=True).clamp(min=1), rows, chosen
