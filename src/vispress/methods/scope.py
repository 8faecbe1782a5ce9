"""SCOPE: keep salient tokens that cover what no kept one covers yet.

Deng et al., "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs",
NeurIPS 2025, arXiv:2510.24214.
Source: https://github.com/kinredon/SCOPE at 6bf7306 (no licence file).
Follows the code: greedy, from nothing; a token gains by how much more similar (cosine of encoder
features, from 0) it is to all tokens than the kept ones are, times its attention from [CLS] in the
layer that gives the features, to the power of `alpha`; crops are selected on their own.
Differs: its sum of gain and attention, which is not what was published, is not offered. Crops that
were unpadded have shares in proportion, newlines are kept within the budget (the code drops them).
`scores="column_mean"` for encoders without [CLS] is a reconstruction.
Each of K picks looks at all pairs of tokens, by definition: time grows with K N^2.
"""

from dataclasses import dataclass
from typing import ClassVar, final, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.checks import check_choice, check_number
from vispress.methods._parts.geometry.segments import GEOMETRY, Part, keep_by_segment
from vispress.methods._parts.scoring.cosines import unit
from vispress.methods._parts.scoring.coverage import greedy_cover
from vispress.methods._parts.scoring.encoder_attention import (
    Scores,
    attention_signals,
    encoder_attention,
)
from vispress.methods.base import Compressor, Evidence
from vispress.registry import register_method
from vispress.types import Placement, Signal, Stage, TokenPlan, VisualTokens


def cover(
    x: Float[Tensor, "b n d"], saliency: Float[Tensor, "b n"], alpha: float, num_keep: int
) -> Int[Tensor, "b K"]:
    """Choose tokens, in the order taken, by the coverage that each adds times its saliency."""
    x = unit(x)
    saliency = saliency.to(x.dtype).pow(alpha)

    def reach(own: slice, some: Tensor | None) -> Tensor:
        rows = x[own] if some is None else x[own, some]
        return rows @ x[own].mT

    return greedy_cover(reach, x, saliency, torch.zeros_like(saliency), num_keep)


@final
@register_method("scope")
@dataclass(frozen=True, kw_only=True)
class SCOPE(Compressor):
    """Prune before the LLM, by coverage and encoder attention; the question plays no part.

    Args:
        alpha: Exponent of the attention, at least 0; 0 leaves coverage alone.
        scores: `"cls"`, or `"column_mean"` (mean attention received) for encoders without [CLS].
    """

    summary: ClassVar[str] = "salient tokens that cover what the kept ones do not"
    paper: ClassVar[str] = "Deng et al., NeurIPS 2025, arXiv:2510.24214"
    evidence: ClassVar[Evidence] = "code"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY | {Signal.CLS_ATTENTION, Signal.VISION_FEATURES}

    alpha: float = 1.0
    scores: Scores = "cls"

    def validate(self) -> None:
        check_choice("scores", self.scores, get_args(Scores))
        check_number("alpha", self.alpha, low=0.0)

    def signals(self) -> frozenset[Signal]:
        return attention_signals(self.reads, self.scores)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.PRE_LLM, budget=self.budget(num_layers)),)

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        assert tokens.vision_features is not None  # declared in `reads`
        saliency, x = encoder_attention(tokens, self.scores), tokens.vision_features

        def pick(part: Part) -> Tensor:
            return cover(part.of(x), part.of(saliency), self.alpha, part.share)

        return TokenPlan(keep=keep_by_segment(tokens, num_keep, pick))
