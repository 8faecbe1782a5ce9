"""Say what a method is asked whose gist tokens, learned tokens of the prompt, stand for images."""

from abc import ABC, abstractmethod


class GistEvictor(ABC):
    """A compressor's part for gist tokens, for a placement with `Stage.CACHE` in layer 0.

    The prompt has one run of gist tokens behind each image. Up to the end of a run all rows attend
    as in the untouched model; rows behind it, in the same call or later, do not see the image. So
    gist tokens are trained to hold what later rows need of it, and behind a prefill the image
    leaves the KV cache of every layer. Positions are kept.
    """

    @property
    @abstractmethod
    def gist_token(self) -> int | None:
        """Name the gist token's id; None for the last word of the model's vocabulary."""

    @property
    @abstractmethod
    def evicts_prefix(self) -> bool:
        """Whether text in front of the document's first gist token is hidden and leaves, too."""
