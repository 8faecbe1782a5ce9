"""V2Drop: drop tokens that a decoder layer hardly moves, at three depths; no attention is read.

Chen et al., "Variation-aware Vision Token Dropping for Faster Large Vision-Language Models", CVPR
2026, arXiv:2509.01552.
Source: https://github.com/xuyang-liu16/V2Drop at 219e03e (Apache-2.0).
Follows the code: a token's score is the L2 norm of what the layer in front of the placement added
to its hidden state; half of the tokens stay before layer 3, a quarter before 17 and one before 22
of 32 (its Qwen2-VL: .25, .0125 and one of 28, before 3, 16 and 22); positions stay.
Differs: counts are truncated shares of the original count, which for these ratios are the code's
shares of what is left. Schedules for other budgets are ours: `keep_ratio` is a mean over decoder
layers (`_parts.schedules.stage_budgets`), `num_tokens` is halved towards.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from jaxtyping import Float
from torch import Tensor

from vispress.budget import Budget, Rounding
from vispress.methods._parts.schedules.stage_budgets import (
    check_schedule,
    stage_budgets,
    stage_layers,
)
from vispress.methods.base import Evidence, ScorePruner
from vispress.registry import register_method
from vispress.types import Placement, Positions, Signal, Stage, VisualTokens

PUBLISHED_LAYERS = (3, 17, 22)
PUBLISHED_RATIOS = (0.5, 0.25, 0.0)
ONE = 1 / 576
"""What a last ratio of 0 leaves of LLaVA-1.5's tokens, in means over layers."""


@final
@register_method("v2drop")
@dataclass(frozen=True, kw_only=True)
class V2Drop(ScorePruner):
    """Prune at several depths, by how far the layer before moved each token.

    Without a budget the published ratios apply. `keep_ratio` is the mean over decoder layers, as
    `mean_keep_ratio`; `num_tokens` is what the last stage leaves, twice of it the one before.

    Args:
        layers: Decoder layers before which tokens are dropped, ascending; None for the published
            3, 17, 22 of 32, scaled by depth.
        ratios: Kept share of the original tokens at each layer, not growing; at the last one 0
            leaves a single token. None for the published 0.5, 0.25, 0.

    Raises:
        ConfigError: The schedule is malformed.
        BudgetError: A ratio is out of range.
    """

    summary: ClassVar[str] = "most moved by the decoder layer before, at three depths"
    paper: ClassVar[str] = "Chen et al., CVPR 2026, arXiv:2509.01552"
    evidence: ClassVar[Evidence] = "code"
    reads: ClassVar[frozenset[Signal]] = frozenset({Signal.UPDATE_NORM})
    rounding: ClassVar[Rounding] = "floor"
    default_positions: ClassVar[Positions] = "original"

    layers: tuple[int, ...] | None = None
    ratios: tuple[float, ...] | None = None

    def validate(self) -> None:
        ratios = PUBLISHED_RATIOS if self.ratios is None else self.ratios
        check_schedule(self.layers, ratios, PUBLISHED_LAYERS, last_may_be_zero=True)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        layers = stage_layers(self.layers, PUBLISHED_LAYERS, num_layers)
        return tuple(
            Placement(stage=Stage.IN_LLM, budget=budget, layer=layer)
            for layer, budget in zip(layers, self.budgets(layers, num_layers), strict=True)
        )

    def budgets(self, layers: tuple[int, ...], num_layers: int) -> tuple[Budget, ...]:
        """Make a budget for each layer."""
        ratios = PUBLISHED_RATIOS if self.ratios is None else self.ratios
        if self.unbudgeted:
            return tuple(
                Budget(keep_ratio=ratio, rounding=self.rounding) if ratio else Budget(num_tokens=1)
                for ratio in ratios
            )
        if not ratios[-1]:
            before = ratios[-2] if len(ratios) > 1 else 1.0
            ratios = (*ratios[:-1], ONE if self.num_tokens is None else before / 2)
        return stage_budgets(self, ratios, layers, num_layers)

    def score(self, tokens: VisualTokens) -> Float[Tensor, "B N"]:
        """Rate tokens by how far the layer moved them."""
        assert tokens.update_norm is not None  # declared in `reads`
        return tokens.update_norm
