"""FasterVLM: keep the visual tokens that the vision encoder's [CLS] token attends to most.

Zhang et al., "[CLS] Attention is All You Need for Training-Free Visual Token Pruning", 2024,
arXiv:2412.01818.
Source: https://github.com/Theia-4869/FasterVLM at f5d5f12 (Apache-2.0).
Follows the code: the attention of the layer that gives the features (the penultimate one in
LLaVA), mean over heads; the thumbnail and every crop have equal shares.
Differs: AnyRes crops that were unpadded have shares in proportion to their tokens, and newline
tokens are kept within the budget (the released evaluation turns both off). `scores="column_mean"`
for encoders without [CLS] is a reconstruction.
"""

from dataclasses import dataclass
from typing import ClassVar, final, get_args

from jaxtyping import Float
from torch import Tensor

from vispress.checks import check_choice
from vispress.methods._parts.geometry.segments import GEOMETRY
from vispress.methods._parts.scoring.encoder_attention import (
    Scores,
    attention_signals,
    encoder_attention,
)
from vispress.methods.base import Evidence, ScorePruner
from vispress.registry import register_method
from vispress.types import Placement, Signal, Stage, VisualTokens


@final
@register_method("fastervlm")
@dataclass(frozen=True, kw_only=True)
class FasterVLM(ScorePruner):
    """Prune before the LLM, by encoder attention; the question plays no part.

    Args:
        scores: `"cls"`, or `"column_mean"` (mean attention received) for encoders without [CLS].

    Raises:
        ConfigError: `scores` is another word.
    """

    summary: ClassVar[str] = "most attended by the encoder's [CLS] token"
    paper: ClassVar[str] = "Zhang et al. 2024, arXiv:2412.01818"
    evidence: ClassVar[Evidence] = "code"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY | {Signal.CLS_ATTENTION}
    per_segment: ClassVar[bool] = True

    scores: Scores = "cls"

    def validate(self) -> None:
        check_choice("scores", self.scores, get_args(Scores))

    def signals(self) -> frozenset[Signal]:
        return attention_signals(self.reads, self.scores)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.PRE_LLM, budget=self.budget(num_layers)),)

    def score(self, tokens: VisualTokens) -> Float[Tensor, "B N"]:
        """Average over heads the attention each token gets."""
        return encoder_attention(tokens, self.scores)
