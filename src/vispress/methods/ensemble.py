"""Ensemble: tokens are kept by a weighted sum of the scores of several methods at one placement.

Composition; scores of different kinds are brought to one scale image by image before they are
added.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, Literal, final, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vispress.budget import Budget
from vispress.checks import check_choice, check_number
from vispress.errors import ConfigError
from vispress.methods._parts.geometry.segments import GEOMETRY
from vispress.methods._parts.scoring.question import scaled
from vispress.methods.base import Compressor, Evidence, ScorePruner, descending
from vispress.methods.fastervlm import FasterVLM
from vispress.methods.max_norm import MaxNorm
from vispress.registry import get_method, register_method
from vispress.types import Placement, Signal, VisualTokens

Normalise = Literal["minmax", "rank"]


def normalised(
    score: Float[Tensor, "B N"], how: Normalise, counted: Bool[Tensor, "B N"] | None = None
) -> Float[Tensor, "B N"]:
    """Bring the scores of each image to `[0, 1]`, in at least fp32.

    Args:
        score: Any range; NaN and infinities count as the lowest.
        how: `"minmax"`: 0 for the lowest, 1 for the highest, or 1 for all where they are equal;
            `"rank"`: `1 - i / N` for the i-th best, ties in order.
        counted: Tokens that set the scale of `"minmax"`; None for all.
    """
    if how == "rank":
        place = descending(score).argsort(dim=1)
        return 1 - place.to(torch.promote_types(score.dtype, torch.float32)) / score.shape[1]
    low = score.masked_fill(~score.isfinite(), float("inf")).amin(dim=1, keepdim=True)
    return scaled(torch.where(score.isfinite(), score, low), counted=counted)


def check_same_placement(names: Sequence[str], placements: Sequence[Sequence[Placement]]) -> None:
    """Refuse methods whose placements differ in more than counts and what is measured on the way.

    Args:
        names: Of the methods.
        placements: Of each.

    Raises:
        ConfigError: One acts more than once, or two act or read elsewhere or otherwise.
    """
    places = {
        replace(place, budget=Budget(keep_ratio=1.0), adaptive=False, transitions=())
        for own in placements
        for place in own
    }
    if len(places) == 1 and all(len(own) == 1 for own in placements):
        return
    got = ", ".join(
        f"{name} before layer {', '.join(str(place.layer) for place in own)}"
        for name, own in zip(names, placements, strict=True)
    )
    differ = [f.name for f in fields(Placement) if len({getattr(p, f.name) for p in places}) > 1]
    raise ConfigError(
        "parts of an ensemble act once, at one place, and are shown the same attention; "
        f"got {got}" + (f" (they differ in {', '.join(differ)})" if differ else "")
    )


def _default() -> tuple[Compressor, ...]:
    return FasterVLM(scores="column_mean"), MaxNorm()


@final
@register_method("ensemble")
@dataclass(frozen=True, kw_only=True)
class Ensemble(ScorePruner):
    """Prune once, by several methods that score tokens and act at the same place.

    The budget is the ensemble's. Where one of the methods splits it over sub-images and frames, all
    do.

    Args:
        parts: At least one method that only scores, or its name; each without a budget.
        weights: Of each part, at least 0, not all 0; None for equal ones.
        normalise: `"minmax"`: to [0, 1] over the image (1 where all are equal); `"rank"`: by place
            in the order, 1 for the best.

    Raises:
        ConfigError: A part is no method that only scores, or has a budget; or weights do not fit.
    """

    summary: ClassVar[str] = "the highest weighted sum of several methods' scores"
    paper: ClassVar[str] = "composition"
    evidence: ClassVar[Evidence] = "composition"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY | {Signal.COLUMN_ATTENTION}

    parts: tuple[Compressor | str, ...] = field(default_factory=_default)
    weights: tuple[float, ...] | None = None
    normalise: Normalise = "minmax"

    def validate(self) -> None:
        check_choice("normalise", self.normalise, get_args(Normalise))
        if not isinstance(self.parts, tuple) or not self.parts:
            raise ConfigError(f"parts must be a non-empty tuple of methods, got {self.parts!r}")
        parts = tuple(get_method(p)() if isinstance(p, str) else p for p in self.parts)
        for part in parts:
            if not isinstance(part, ScorePruner):
                name = getattr(part, "name", repr(part))
                raise ConfigError(f"parts: {name} does not rank tokens by a score alone")
            if part.given_budget():
                raise ConfigError(f"parts: the budget is the ensemble's, {part.name} has its own")
        object.__setattr__(self, "parts", parts)
        for name in ("needs", "per_segment", "default_positions"):
            values = [getattr(part, name) for part in parts]
            object.__setattr__(self, name, next(filter(None, values), values[0]))
        if self.weights is not None:
            if not isinstance(self.weights, tuple) or len(self.weights) != len(parts):
                raise ConfigError(f"weights must be {len(parts)} numbers, got {self.weights!r}")
            for weight in self.weights:
                check_number("weights", weight, low=0.0)
            if not math.fsum(self.weights) > 0.0:
                raise ConfigError(f"weights must not all be 0, got {self.weights!r}")

    def members(self) -> tuple[ScorePruner, ...]:
        return tuple(part for part in self.parts if isinstance(part, ScorePruner))

    def views(self) -> tuple[Compressor, ...]:
        return self.members()

    def signals(self) -> frozenset[Signal]:
        return frozenset().union(*(part.signals() for part in self.members()))

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        found = [replace(part, keep_ratio=0.5).placements(num_layers) for part in self.members()]
        check_same_placement([part.name for part in self.members()], found)
        first = found[0][0]
        measured = sorted({done for own in found for done in own[0].transitions})
        budget = self.budget(num_layers, first.layer)
        return (replace(first, budget=budget, transitions=tuple(measured)),)

    def score(self, tokens: VisualTokens) -> Float[Tensor, "B N"]:
        """Average the parts' scores by weight, each in `[0, 1]`."""
        seen = tokens.views or (tokens,) * len(self.parts)
        weights = self.weights or (1.0,) * len(self.parts)
        visual = None
        if tokens.segmented:  # newlines do not set the scale
            visual = (tokens.segments() >= 0).to(tokens.index.device)
        total = torch.zeros_like(tokens.index, dtype=torch.float32)
        for part, own, weight in zip(self.members(), seen, weights, strict=True):
            score = normalised(part.score(own), self.normalise, visual)
            total = total + weight / math.fsum(weights) * score
        return total
