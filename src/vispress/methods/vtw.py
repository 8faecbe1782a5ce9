"""VTW: withdraw all visual tokens in the middle of the LLM.

Control, after visual tokens withdrawal (Lin et al., arXiv:2405.05803); the rule is known to us from
comparison tables: every visual token leaves before one decoder layer, half of the depth by default.
It bounds what a progressive method can save after that layer, and shows how early the LLM has read
the picture. Reconstructed: the search for the layer on calibration data is not part of it; give
`layer`.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from vispress.budget import PUBLISHED_DEPTH, Budget, scaled_layer
from vispress.checks import check_integer
from vispress.methods.base import Compressor, Evidence, check_layer, keep_none
from vispress.registry import register_method
from vispress.types import Placement, Positions, Stage, TokenPlan, VisualTokens


@final
@register_method("vtw")
@dataclass(frozen=True, kw_only=True)
class VTW(Compressor):
    """Drop all visual tokens before one decoder layer; takes no budget.

    The mean over decoder layers that it keeps is `layer / num_layers`.

    Args:
        layer: Decoder layer before which they are dropped, in `[1, num_layers)`; None for half of
            the depth.

    Raises:
        BudgetError: A budget is given.
        ConfigError: The layer is no positive integer.
    """

    summary: ClassVar[str] = "all, then none: withdrawn at half of the LLM's depth"
    paper: ClassVar[str] = "control"
    evidence: ClassVar[Evidence] = "control"
    takes_budget: ClassVar[bool] = False
    default_positions: ClassVar[Positions] = "original"

    layer: int | None = None

    def validate(self) -> None:
        if self.layer is not None:
            check_integer("layer", self.layer, low=1)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        half = scaled_layer(PUBLISHED_DEPTH // 2, num_layers)
        layer = half if self.layer is None else self.layer
        check_layer("layer", layer, num_layers)
        return (Placement(stage=Stage.IN_LLM, budget=Budget(num_tokens=0), layer=layer),)

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        return keep_none(tokens)
