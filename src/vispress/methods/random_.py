"""Random tokens: the control that every method must beat.

Control; the same budget, segments and newline rule as the methods it is compared with.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from vispress.checks import check_integer
from vispress.devices import sent
from vispress.methods._parts.geometry.segments import GEOMETRY
from vispress.methods.base import Evidence, ScorePruner
from vispress.registry import register_method
from vispress.types import Placement, Signal, Stage, VisualTokens


@final
@register_method("random")
@dataclass(frozen=True, kw_only=True)
class Random(ScorePruner):
    """Prune before the LLM, without looking; report the mean of at least three seeds.

    All images with equally many tokens keep the same places, so that an image keeps what it would
    keep alone.

    Args:
        seed: Seed of a generator of its own on the host, at least 0; the global one is not touched.

    Raises:
        ConfigError: The seed is negative or no integer.
    """

    summary: ClassVar[str] = "tokens drawn at random without replacement"
    paper: ClassVar[str] = "control"
    evidence: ClassVar[Evidence] = "control"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY
    per_segment: ClassVar[bool] = True

    seed: int = 0

    def validate(self) -> None:
        check_integer("seed", self.seed, low=0)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.PRE_LLM, budget=self.budget(num_layers)),)

    def score(self, tokens: VisualTokens) -> Float[Tensor, "B N"]:
        """Draw a number for each token, the same on every device."""
        generator = torch.Generator("cpu").manual_seed(self.seed)
        drawn = torch.rand(tokens.num_visual, generator=generator)
        return sent(drawn, tokens.features.device).expand(tokens.batch, -1)
