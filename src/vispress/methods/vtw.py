"""VTW: withdraw all visual tokens in the middle of the LLM.

Lin et al., "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid
Inference", AAAI 2025, arXiv:2405.05803.
Source: the authors' code (lzhxmu/VTW a3d8cfc, no licence) and its vectors.
Follows the code: every visual token leaves before decoder layer K, 15 of 32 for LLaVA-1.5-7B (16
for Video-LLaVA, 20 for LISA); positions of the text stay, or are made compact. K is found by
`vispress search withdrawal`: the first layer, from 5 on, of which the next token's distribution
diverges from the untouched model's by no more than 0.003 nats (0.0005 for 13B, 0.0001 for
LLaVA-NeXT), as a mean over some prompts.
Differs: which tokens are visual is the model's, where the code has 576 behind 35 others. It reads
nothing and takes no budget, so it stands among the controls of a benchmark, too: it bounds what a
method can save behind that layer.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from vispress.budget import Budget, scaled_layer
from vispress.checks import check_integer
from vispress.methods.base import Compressor, Evidence, check_layer, keep_none
from vispress.registry import register_method
from vispress.types import Placement, Positions, Stage, TokenPlan, VisualTokens

PUBLISHED_LAYER = 15


@final
@register_method("vtw")
@dataclass(frozen=True, kw_only=True)
class VTW(Compressor):
    """Drop all visual tokens before one decoder layer; takes no budget.

    The mean over decoder layers that it keeps is `layer / num_layers`.

    Args:
        layer: Decoder layer before which they are dropped, in `[0, num_layers)`; None for 15 of 32,
            scaled by depth.

    Raises:
        BudgetError: A budget is given.
        ConfigError: The layer is out of range.
    """

    summary: ClassVar[str] = "all, then none: withdrawn in the middle of the LLM"
    paper: ClassVar[str] = "Lin et al., AAAI 2025, arXiv:2405.05803"
    evidence: ClassVar[Evidence] = "code"
    takes_budget: ClassVar[bool] = False
    default_positions: ClassVar[Positions] = "original"

    layer: int | None = None

    def validate(self) -> None:
        if self.layer is not None:
            check_integer("layer", self.layer, low=0)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        layer = scaled_layer(PUBLISHED_LAYER, num_layers) if self.layer is None else self.layer
        check_layer("layer", layer, num_layers, low=0)
        stage = Stage.IN_LLM if layer else Stage.PRE_LLM
        return (Placement(stage=stage, budget=Budget(num_tokens=0), layer=layer),)

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        return keep_none(tokens)
