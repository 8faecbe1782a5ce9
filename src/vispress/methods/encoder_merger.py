"""What a method that merges tokens inside the vision encoder is asked, and what it is shown."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from vispress_kernels import Backend


@dataclass(frozen=True, kw_only=True)
class EncoderTokens:
    """Encoder sequences at one layer, between its attention and its MLP.

    A token is what becomes one visual token: one patch, or the patches that a merger joins.

    Args:
        keys: `[B, H, n, Dh]`, keys as the layer attends to them (post-RoPE), in at least fp32; mean
            over the patches of a token. A [CLS] token, where there is one, comes first.
        count: `[B]` int64; tokens of each sequence, [CLS] included; what is behind them is padding.
            None where no sequence is padded.
        merges: `[B]` int64; tokens to merge away in this layer, at most half of those not [CLS].
            One number where all sequences have the same.
        has_cls: Whether the first token is [CLS], which stays as it is.
        backend: Kernels to use.
    """

    keys: Float[Tensor, "B H n Dh"]
    count: Int[Tensor, "B"] | None
    merges: Int[Tensor, "B"] | int
    has_cls: bool
    backend: Backend = "auto"


class EncoderMerger(ABC):
    """A compressor's part in the encoder, for a placement with `Stage.ENCODER`.

    Merged values are means weighted by how many tokens each stands for (its size), and the log of
    the sizes is added to the attention logits of their keys; both are the runtime's affair.
    """

    @abstractmethod
    def merges_per_layer(self, num_tokens: int, num_keep: int, num_layers: int) -> tuple[int, ...]:
        """Count what each of `num_layers` encoder layers merges away, at most half of its tokens.

        Args:
            num_tokens: Tokens of the sequence, [CLS] not counted.
            num_keep: What should be left; more may be, where layers are few.
            num_layers: Encoder layers up to the one that gives the features.
        """

    @abstractmethod
    def fold(self, tokens: EncoderTokens) -> Int[Tensor, "B n"]:
        """Give each token the place `0 .. count - merges - 1` behind this layer; -1 for padding.

        Tokens with one place are merged; every place is taken; [CLS] has place 0 to itself.
        """
