"""XAI compression: a small convolution learns from relevance which tokens an answer rests on.

"Generic Token Compression in Multimodal Large Language Models from an Explainability Perspective",
ICLR 2026, arXiv:2506.01097.
Source: the paper, through detailed notes; no code is published.
Follows the paper: attention of the first decoder layer from the words of the instruction to each
visual token, a mean over heads and words, goes through five depth-wise separable convolutions of 32
to 512 channels along the tokens and a linear map to one score; the highest stay, before the LLM.
The target of training is relevance by gradients (attention times its positive gradient, rolled out
over layers, from each word of the model's own right answer; the lower half is zeroed), the loss its
divergence from the softmax of the scores.
Reconstructed: kernels of 3 tokens that repeat the first and the last one, ReLU, positions stay.
Attention is scaled to a mean of 1 over
an image, so that images of all sizes look alike.
Differs: each image is scored on its own; the words are those behind it. Where none follows, all its
tokens count as equally attended.
Untrained its choice means nothing; weights belong to one model, and nobody ships any: `vispress
train-compressor --method xai_compress` makes them.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vispress.checks import check_integer
from vispress.errors import ConfigError
from vispress.methods._parts.networks.layers import Dense
from vispress.methods.base import Evidence, ScorePruner, upcast
from vispress.precision import full_precision
from vispress.registry import register_method
from vispress.types import (
    ModuleShape,
    Placement,
    Positions,
    Queries,
    Signal,
    Stage,
    VisualTokens,
)

CHANNELS = (32, 64, 128, 256, 512)


class Separable(nn.Module):
    """Mix each channel along the tokens, then the channels of each token; ReLU.

    Args:
        channels_in: Of the input.
        channels_out: Of the output.
        kernel: Tokens that each one sees, odd.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int) -> None:
        super().__init__()
        self.along = nn.Parameter(torch.empty(channels_in, 1, kernel))
        nn.init.kaiming_uniform_(self.along, nonlinearity="linear")
        self.across = Dense(channels_in, channels_out)
        nn.init.kaiming_uniform_(self.across.weight, nonlinearity="relu")

    def forward(self, x: Float[Tensor, "B N I"]) -> Float[Tensor, "B N O"]:
        """Mix tokens; beyond the first and the last it goes on as there."""
        weight = self.along.to(x)
        beyond = weight.shape[-1] // 2
        wide = F.pad(x.mT, (beyond, beyond), mode="replicate")
        return F.relu(self.across(F.conv1d(wide, weight, groups=len(weight)).mT))


class RelevanceConv(nn.Module):
    """Predict how relevant each visual token is, from the attention that it receives.

    Args:
        channels: Of each convolution.
        kernel: Tokens that each one sees, odd.
    """

    def __init__(self, channels: tuple[int, ...], kernel: int) -> None:
        super().__init__()
        widths = zip((1, *channels), channels, strict=False)
        self.layers = nn.Sequential(*(Separable(i, o, kernel) for i, o in widths))
        self.out = Dense(channels[-1], 1)

    def forward(self, attention: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """Score tokens, in at least fp32: logits of their share of all relevance.

        Args:
            attention: That each token receives, not negative, in any unit.
        """
        with full_precision():
            received = upcast(attention)
            mean = received.mean(dim=1, keepdim=True)
            told = torch.where(mean > 0, received / mean.clamp(min=1e-30), 1.0)
            score: Tensor = self.out(self.layers(told[..., None]))[..., 0]
        return score


@final
@register_method("xai_compress")
@dataclass(frozen=True, kw_only=True)
class XAICompress(ScorePruner):
    """Prune before the LLM, by relevance that a trained network predicts from attention.

    Args:
        kernel: Tokens that each convolution sees, odd.

    Raises:
        ConfigError: The kernel is even.
    """

    summary: ClassVar[str] = "relevance to the answer, predicted from the first layer's attention"
    paper: ClassVar[str] = "ICLR 2026, arXiv:2506.01097"
    evidence: ClassVar[Evidence] = "paper"
    reads: ClassVar[frozenset[Signal]] = frozenset({Signal.MEAN_ATTENTION})
    trained: ClassVar[bool] = True
    default_positions: ClassVar[Positions] = "original"

    kernel: int = 3

    def validate(self) -> None:
        check_integer("kernel", self.kernel, low=1)
        if self.kernel % 2 == 0:
            raise ConfigError(f"kernel must be odd, got {self.kernel}")

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (
            Placement(
                stage=Stage.PRE_LLM,
                budget=self.budget(num_layers),
                queries=Queries.TEXT_AFTER,
                probe=0,
            ),
        )

    def make_module(self, shape: ModuleShape) -> RelevanceConv:
        return RelevanceConv(CHANNELS, self.kernel)

    def score(self, tokens: VisualTokens) -> Float[Tensor, "B N"]:
        """Predict relevance."""
        assert tokens.module is not None  # `trained`
        assert tokens.mean_attention is not None  # declared in `reads`
        score: Tensor = tokens.module(tokens.mean_attention)
        return score
