"""Largest tokens: a control that keeps what a norm alone would call important.

Control; the same budget, segments and newline rule as the methods it is compared with. Encoders put
global information into a few outlier tokens, which this control picks first.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from vispress.methods._parts.geometry.segments import GEOMETRY
from vispress.methods.base import Evidence, ScorePruner, upcast
from vispress.registry import register_method
from vispress.types import Placement, Signal, Stage, VisualTokens


@final
@register_method("max_norm")
@dataclass(frozen=True, kw_only=True)
class MaxNorm(ScorePruner):
    """Prune before the LLM, by the Euclidean length of projected tokens."""

    summary: ClassVar[str] = "longest projected tokens"
    paper: ClassVar[str] = "control"
    evidence: ClassVar[Evidence] = "control"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY
    per_segment: ClassVar[bool] = True

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.PRE_LLM, budget=self.budget(num_layers)),)

    def score(self, tokens: VisualTokens) -> Float[Tensor, "B N"]:
        """Measure the length of each token."""
        length: Tensor = torch.linalg.vector_norm(upcast(tokens.features), dim=-1)
        return length
