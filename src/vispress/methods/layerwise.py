"""Layerwise: a keep rate for every decoder layer, ranked by the attention of the layer before.

Zhao et al., G-Search and P-Sigmoid, CVPR 2025, arXiv:2412.00556.
Source: secondary descriptions; no code was found, nothing was read.
Follows the family: tokens are ranked by the last prompt token's attention in the layer before, and
a rate per layer says how many stay; the rates are a sigmoid in depth (P-Sigmoid) or what a greedy
search found (G-Search). `vispress search` finds both. Ranking, sigmoid and defaults are
reconstructed: 12 and 0.35 are a worked example, not published values.
Differs: at most 8 placements stand for the rates of all layers (same mean); each image has its own
budget; positions stay.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, final, get_args

from jaxtyping import Float
from torch import Tensor

from vispress.budget import Budget, Rounding
from vispress.checks import check_ascending, check_choice, check_number
from vispress.errors import BudgetError, ConfigError
from vispress.methods._parts.schedules.layer_ratios import (
    bundle,
    mean_ratio,
    sigmoid_ratios,
    solve_sigmoid,
)
from vispress.methods._parts.schedules.stage_budgets import (
    check_schedule,
    stage_budgets,
    stage_layers,
)
from vispress.methods.base import Evidence, ScorePruner, upcast
from vispress.registry import register_method
from vispress.types import Placement, Positions, Queries, Signal, Stage, VisualTokens

Asking = Literal["last", "text"]
PUBLISHED_MIDPOINT = 0.35


@final
@register_method("layerwise")
@dataclass(frozen=True, kw_only=True)
class Layerwise(ScorePruner):
    """Prune at many depths, by the attention of the layer before.

    `keep_ratio` is the mean over decoder layers, as `mean_keep_ratio`: the midpoint is solved for
    it. `num_tokens` is what the last placement leaves.

    Args:
        layers: Decoder layers before which tokens are dropped, as a search found them.
        ratios: Share of the original tokens that enters each of them, not growing; the last may be
            0. With `layers`, in place of the sigmoid and of a budget.
        steepness: Of the sigmoid, above 0; searched in 2 to 40.
        midpoint: Depth at which half is dropped, in `[-1, 2]` of the LLM's; in place of a budget.
        floor: Share that is left at the end, in `[0, 1]`.
        queries: `"last"`, or `"text"` for the mean over the words behind the image.
    """

    summary: ClassVar[str] = "most attended by the last prompt token, at a rate for each layer"
    paper: ClassVar[str] = "Zhao et al., CVPR 2025, arXiv:2412.00556"
    evidence: ClassVar[Evidence] = "reconstructed"
    reads: ClassVar[frozenset[Signal]] = frozenset({Signal.QUERY_ATTENTION})
    rounding: ClassVar[Rounding] = "ceil"
    default_positions: ClassVar[Positions] = "original"

    layers: tuple[int, ...] | None = None
    ratios: tuple[float, ...] | None = None
    steepness: float = 12.0
    midpoint: float | None = None
    floor: float = 0.0
    queries: Asking = "last"

    def validate(self) -> None:
        check_number("steepness", self.steepness, low=0.01, high=100.0)
        check_number("floor", self.floor, low=0.0, high=1.0)
        check_choice("queries", self.queries, get_args(Asking))
        if self.midpoint is not None:
            check_number("midpoint", self.midpoint, low=-1.0, high=2.0)
        if self.layers is not None:
            check_ascending("layers", self.layers, low=1)
        check_schedule(self.layers, self.ratios, (), last_may_be_zero=True)
        if self.layers is not None and self.ratios is None:
            raise ConfigError(f"layers need ratios, got layers={self.layers!r} alone")
        budgets = (self.keep_ratio, self.num_tokens, self.mean_keep_ratio)
        given = [budget for budget in (self.ratios, self.midpoint, *budgets) if budget is not None]
        if len(given) > 1:
            raise BudgetError(
                "give ratios, a midpoint or a budget, each says how much is kept: got "
                + " and ".join(map(repr, given))
            )

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        layers, ratios = self._schedule(num_layers)
        if self.num_tokens is not None:
            budgets = stage_budgets(self, ratios, layers, num_layers)
        else:
            budgets = tuple(
                Budget(keep_ratio=r, rounding=self.rounding) if r else Budget(num_tokens=0)
                for r in ratios
            )
        asking = Queries.LAST if self.queries == "last" else Queries.TEXT_AFTER
        return tuple(
            Placement(stage=Stage.IN_LLM, budget=budget, layer=layer, queries=asking)
            for layer, budget in zip(layers, budgets, strict=True)
        )

    def _schedule(self, num_layers: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        if self.ratios is not None:
            return stage_layers(self.layers, (), num_layers), self.ratios
        midpoint, floor = self.midpoint, self.floor
        mean = self.keep_ratio if self.mean_keep_ratio is None else self.mean_keep_ratio
        if mean is not None:
            midpoint, floor = solve_sigmoid(self.steepness, floor, num_layers, mean_ratio, mean)
        elif midpoint is None:
            self.budget(num_layers)  # refuses, unless there is a count
            midpoint = PUBLISHED_MIDPOINT
        return bundle(sigmoid_ratios(self.steepness, midpoint, floor, num_layers))

    def score(self, tokens: VisualTokens) -> Float[Tensor, "B N"]:
        """Average over heads and queries; without words behind the image, zeros."""
        assert tokens.query_attention is not None  # declared in `reads`
        rows = upcast(tokens.query_attention).mean(dim=1)
        return rows[:, 0] if rows.shape[1] == 1 else rows.sum(dim=1) / max(1, rows.shape[1])
