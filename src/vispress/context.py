"""What surrounds an image in a prompt of demonstrations and a query."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Context:
    """Means over tokens, in at least fp32, one row an image of the bucket.

    Text is every valid token that is no placeholder, a template's marks included.

    Args:
        paired_text: `[B, D]`, input embeddings of the text between an image and the next one, or of
            the next such text where images stand side by side; where none follows, of the text
            before it; 0 without any.
        query: `[B, D]`, hidden states of what is left of the prompt's last image and of the text
            behind it; None before the LLM.
        earlier: `[B, D]`, hidden states of what is left of the images before the last; in a prompt
            with one image, of the text behind it, or 0 without any. None before the LLM.
    """

    paired_text: Float[Tensor, "B D"]
    query: Float[Tensor, "B D"] | None = None
    earlier: Float[Tensor, "B D"] | None = None
