"""ADSC: drop every other visual token at several depths, without looking at any of them.

Deniz et al., "Attention-driven self-compression", arXiv:2602.12618.
Source: abstract and secondary descriptions; no code is public, nothing was read.
Follows the inference rule: at chosen layers, equal steps along the surviving visual tokens; no
scores, attention or weights; positions stay. The layers are reconstructed from the published means
(of 576 tokens 193.5 for "192", 132.75, 67.5), the place inside a step from causality: the last of a
group has attended to the others. The paper's gain comes from fine-tuning LoRA adapters on answers
with the rule in place, under a reverse curriculum over ratios, whose stages are not published.
Reconstructed: equal shares of training at the harshest preset, at those up to the target, and at
the target (`curriculum`; `set_progress` and `CompressionCallback` move a model along).
Differs: each image, crop and frame is thinned on its own, newlines stay; counts are
floors of shares of the original count. Schedules other than the presets are ours.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, final, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from vispress.budget import Rounding
from vispress.checks import check_ascending, check_choice, check_integer
from vispress.errors import ConfigError
from vispress.methods._parts.geometry.grid_thinning import (
    Offset,
    Places,
    thin_each,
    thin_grid,
    thin_run,
)
from vispress.methods._parts.geometry.segments import GEOMETRY
from vispress.methods._parts.schedules.stage_budgets import (
    solve_layers,
    stage_budgets,
    stage_layers,
)
from vispress.methods.base import Compressor, Evidence
from vispress.registry import register_method
from vispress.types import Placement, Positions, Signal, Stage, TokenPlan, VisualTokens

Mode = Literal["1d", "2d"]
Curriculum = Literal["none", "reverse", "forward"]
PRESETS = {192: (4, 10, 18), 128: (2, 5, 9), 64: (1, 2, 3, 6)}
"""Layers of 32 before which tokens are dropped, by the mean of 576 that they stand for."""
WHOLE = 576


@final
@register_method("adsc")
@dataclass(frozen=True, kw_only=True)
class ADSC(Compressor):
    """Prune at equal steps, at several depths.

    Without a budget the preset applies. `keep_ratio` is the mean over decoder layers, as
    `mean_keep_ratio`: unless `layers` are given, they are solved for it (`solve_layers`), and the
    ratios are adjusted to what is missing. `num_tokens` is what the last stage leaves.

    Args:
        preset: Mean of kept tokens of 576: 192, 128 or 64.
        layers: Decoder layers before which to drop, ascending; None for the preset's, scaled by
            depth.
        stride: One token of so many stays at each layer.
        offset: Which one of a group stays: `"last"` or `"first"`.
        mode: `"2d"` thins columns and rows in turn, so that what is left is a lattice (24 x 24,
            24 x 12, 12 x 12, 12 x 6); `"1d"` runs along the raster.
        curriculum: Which presets training passes on its way to the target: none, those that leave
            fewer tokens (`"reverse"`, the paper's) or those that leave more (`"forward"`).
    """

    summary: ClassVar[str] = "tokens at equal steps, fewer at several depths"
    paper: ClassVar[str] = "Deniz et al., arXiv:2602.12618"
    evidence: ClassVar[Evidence] = "reconstructed"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY
    rounding: ClassVar[Rounding] = "floor"
    default_positions: ClassVar[Positions] = "original"

    preset: int = 192
    layers: tuple[int, ...] | None = None
    stride: int = 2
    offset: Offset = "last"
    mode: Mode = "2d"
    curriculum: Curriculum = "none"

    def validate(self) -> None:
        check_choice("preset", self.preset, PRESETS)
        if self.layers is not None:
            check_ascending("layers", self.layers, low=1)
        check_integer("stride", self.stride, low=2)
        check_choice("offset", self.offset, get_args(Offset))
        check_choice("mode", self.mode, get_args(Mode))
        check_choice("curriculum", self.curriculum, get_args(Curriculum))
        if self.curriculum != "none" and (self.layers is not None or self.num_tokens is not None):
            raise ConfigError(
                f"curriculum={self.curriculum!r} solves layers for each of its means; leave out "
                "layers and num_tokens, or set curriculum='none'"
            )

    def at(self, progress: float) -> "ADSC":
        """Give the preset that training passes at this share, or the target."""
        mean = self.mean_keep_ratio if self.keep_ratio is None else self.keep_ratio
        target = self.preset / WHOLE if mean is None else mean
        passed = {
            "none": [],
            "reverse": sorted(p for p in PRESETS if p / WHOLE < target),
            "forward": sorted((p for p in PRESETS if p / WHOLE > target), reverse=True),
        }[self.curriculum]
        stage = int(progress * (len(passed) + 1))
        if stage >= len(passed):
            return self
        if mean is None:
            return replace(self, preset=passed[stage])
        if self.keep_ratio is not None:
            return replace(self, keep_ratio=passed[stage] / WHOLE)
        return replace(self, mean_keep_ratio=passed[stage] / WHOLE)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        mean = self.mean_keep_ratio if self.keep_ratio is None else self.keep_ratio
        if mean is None or self.layers is not None:
            layers = stage_layers(self.layers, PRESETS[self.preset], num_layers)
        else:
            layers = solve_layers(mean, self.stride, num_layers)
        ratios = tuple(float(self.stride) ** -(i + 1) for i in range(len(layers)))
        budgets = stage_budgets(self, ratios, layers, num_layers)
        return tuple(
            Placement(stage=Stage.IN_LLM, budget=budget, layer=layer)
            for layer, budget in zip(layers, budgets, strict=True)
        )

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        return thin_each(tokens, num_keep, self._thin)

    def _thin(self, places: Places, num_keep: int) -> Int[Tensor, "share"]:
        if self.mode == "1d":
            return thin_run(len(places.row), num_keep, self.offset)
        return thin_grid(places, num_keep, self.stride, self.offset)
