"""PyramidDrop: drop more visual tokens the deeper the layer, by the last prompt token's attention.

Xing et al., "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual
Redundancy Reduction", CVPR 2025, arXiv:2410.17247.
Source: https://github.com/Cooperx521/PyramidDrop at 6444f30 (MIT).
Follows the code's inference path: at each stage the attention of the *next* layer (its norm, q, k
and RoPE) ranks the tokens that are left; counts are truncated shares of the original count;
positions are renumbered.
With labels the rows before every answer of a document rank, averaged, as in its training path.
Differs: each image has its own budget; schedules other than the published one are ours
(`_parts.schedules.stage_budgets`).
"""

from dataclasses import dataclass
from typing import ClassVar, final

from jaxtyping import Float
from torch import Tensor

from vispress.budget import Rounding
from vispress.methods._parts.schedules.stage_budgets import (
    check_schedule,
    stage_budgets,
    stage_layers,
)
from vispress.methods.base import Evidence, ScorePruner, upcast
from vispress.registry import register_method
from vispress.types import Placement, Queries, Signal, Stage, VisualTokens

PUBLISHED_LAYERS = (8, 16, 24)
PUBLISHED_RATIO = 0.5
"""Kept from stage to stage: 1/2, 1/4, 1/8 of the original tokens."""


@final
@register_method("pyramiddrop")
@dataclass(frozen=True, kw_only=True)
class PyramidDrop(ScorePruner):
    """Prune at several depths, each time by the attention of the layer that comes next.

    Without a budget the published ratios apply. `keep_ratio` is the mean over decoder layers, as
    `mean_keep_ratio`; `num_tokens` is what the last stage leaves (earlier ones: `ratios` in
    proportion).

    Args:
        layers: Decoder layers before which tokens are dropped, ascending; None for the published
            8, 16, 24 of 32, scaled by depth.
        ratios: Kept share of the original tokens at each layer, not growing; None to halve each
            time.

    Raises:
        ConfigError: The schedule is malformed.
        BudgetError: A ratio is out of range.
    """

    summary: ClassVar[str] = "most attended by the last prompt token, halved at three depths"
    paper: ClassVar[str] = "Xing et al., CVPR 2025, arXiv:2410.17247"
    evidence: ClassVar[Evidence] = "code"
    reads: ClassVar[frozenset[Signal]] = frozenset({Signal.QUERY_ATTENTION})
    rounding: ClassVar[Rounding] = "floor"

    layers: tuple[int, ...] | None = None
    ratios: tuple[float, ...] | None = None

    def validate(self) -> None:
        check_schedule(self.layers, self.ratios, PUBLISHED_LAYERS)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        layers = stage_layers(self.layers, PUBLISHED_LAYERS, num_layers)
        ratios = self.ratios or tuple(PUBLISHED_RATIO ** (i + 1) for i in range(len(layers)))
        budgets = stage_budgets(self, ratios, layers, num_layers)
        return tuple(
            Placement(
                stage=Stage.IN_LLM,
                budget=budget,
                layer=layer,
                queries=Queries.ENDS,
                attention_of="next",
            )
            for layer, budget in zip(layers, budgets, strict=True)
        )

    def score(self, tokens: VisualTokens) -> Float[Tensor, "B N"]:
        """Average attention over heads and ends of prompts (one but in training)."""
        assert tokens.query_attention is not None  # declared in `reads`
        return upcast(tokens.query_attention).mean(dim=(1, 2))
