"""Uniform sampling: tokens at equal steps, along the raster or on a grid.

Control; the strongest simple baseline for pruning at high keep ratios, and exact in one dimension.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from vispress.checks import check_choice
from vispress.devices import sent
from vispress.methods._parts.geometry.grids import middles, sample
from vispress.methods._parts.geometry.segments import GEOMETRY, Part, keep_by_segment
from vispress.methods.base import Compressor, Evidence
from vispress.registry import register_method
from vispress.types import Placement, Signal, Stage, TokenPlan, VisualTokens


@final
@register_method("uniform")
@dataclass(frozen=True, kw_only=True)
class Uniform(Compressor):
    """Prune before the LLM, at equal steps.

    Args:
        dims: 1 for the middles of equal runs of the raster, `floor((k + 0.5) N / K)`: exactly the
            count asked. 2 for the centres of a coarser grid of the same aspect: at most the count
            asked.

    Raises:
        ConfigError: `dims` is another number.
    """

    summary: ClassVar[str] = "tokens at equal steps along the raster or grid"
    paper: ClassVar[str] = "control"
    evidence: ClassVar[Evidence] = "control"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY
    exact: ClassVar[bool] = False  # of `dims=2`

    dims: int = 1

    def validate(self) -> None:
        check_choice("dims", self.dims, (1, 2))

    def whole_only(self) -> bool:
        return self.dims == 2

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.PRE_LLM, budget=self.budget(num_layers)),)

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        if self.dims == 2:
            return sample(tokens, num_keep)

        def pick(part: Part) -> Tensor:
            places = sent(middles(part.places.shape[-1], part.share), part.places.device)
            return places.expand(len(part.of(tokens.index)), -1)

        return TokenPlan(keep=keep_by_segment(tokens, num_keep, pick))
