"""VisPruner: half of the tokens by [CLS] attention, half by removing duplicates among the rest.

Zhang et al., "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in
VLMs", ICCV 2025, arXiv:2412.01818.
Source: https://github.com/Theia-4869/VisPruner at aefa01a (Apache-2.0).
Follows the code: attention of the layer that gives the features, mean over heads; the rest, in
descending attention, is split into even and odd places, the even tokens most similar to an odd one
(cosine of encoder features) are dropped, `step` a round; survivors stand in descending similarity
before the odd ones.
Differs: any count works (the code crashes when the rest is odd, or when less than half of a list
survives): a round drops at most the even places; cosines within rounding of 1 are equal. AnyRes
crops that were unpadded have shares in proportion, newlines are kept within the budget.
`scores="column_mean"` for encoders without [CLS] is a reconstruction.
Each of (N - K) / `step` rounds compares half of a list with the other half, by definition:
time grows with N^3 for a share, cosines are held up to 4,096 tokens.
"""

from dataclasses import dataclass
from typing import ClassVar, final, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.checks import check_choice, check_integer, check_number
from vispress.methods._parts.clustering.duplicate_removal import remove_duplicates
from vispress.methods._parts.geometry.segments import GEOMETRY, Part, keep_by_segment
from vispress.methods._parts.scoring.encoder_attention import (
    Scores,
    attention_signals,
    encoder_attention,
)
from vispress.methods.base import Compressor, Evidence, descending
from vispress.registry import register_method
from vispress.types import Placement, Signal, Stage, TokenPlan, VisualTokens


@final
@register_method("vispruner")
@dataclass(frozen=True, kw_only=True)
class VisPruner(Compressor):
    """Prune before the LLM, by encoder attention and by duplicates; the question plays no part.

    Args:
        important_ratio: Share of the kept tokens that attention alone picks, in `[0, 1]`.
        step: Duplicates dropped a round, at least 1.
        scores: `"cls"`, or `"column_mean"` (mean attention received) for encoders without [CLS].

    Raises:
        ConfigError: A value is out of its range.
    """

    summary: ClassVar[str] = "most attended by [CLS], and the rest without duplicates"
    paper: ClassVar[str] = "Zhang et al., ICCV 2025, arXiv:2412.01818"
    evidence: ClassVar[Evidence] = "code"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY | {Signal.CLS_ATTENTION, Signal.VISION_FEATURES}

    important_ratio: float = 0.5
    step: int = 8
    scores: Scores = "cls"

    def validate(self) -> None:
        check_choice("scores", self.scores, get_args(Scores))
        check_number("important_ratio", self.important_ratio, low=0.0, high=1.0)
        check_integer("step", self.step, low=1)

    def signals(self) -> frozenset[Signal]:
        return attention_signals(self.reads, self.scores)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.PRE_LLM, budget=self.budget(num_layers)),)

    def select(
        self, score: Float[Tensor, "b n"], features: Float[Tensor, "b n d"], num_keep: int
    ) -> Int[Tensor, "b K"]:
        """Take important tokens by descending score, then diverse ones in the last order."""
        important = int(num_keep * self.important_ratio)
        ranked = descending(score)
        rest = remove_duplicates(ranked[:, important:], features, num_keep - important, self.step)
        return torch.cat([ranked[:, :important], rest], dim=1)

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        assert tokens.vision_features is not None  # declared in `reads`
        score, features = encoder_attention(tokens, self.scores), tokens.vision_features

        def pick(part: Part) -> Tensor:
            return self.select(part.of(score), part.of(features), part.share)

        return TokenPlan(keep=keep_by_segment(tokens, num_keep, pick))
