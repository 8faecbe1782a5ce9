"""ZOO-Prune: keep tokens to which the projector is sensitive and that differ from each other.

Kim et al., "Training-free Token Pruning via Zeroth-Order Gradient Estimation in Vision-Language
Models", 2025, arXiv:2509.24837.
Source: https://github.com/AIM-SKKU/ZOO-Prune at 159f7f9, AnyRes at 2d1194b (no licence file: read,
not copied).
Follows the code where its docstrings disagree: sensitivity is the *mean* over directions,
diversity is measured on *projected* tokens; sub-images and frames are selected on their own.
Differs: the exact projector in at least fp32 (the code's fp16 step of 0.01 loses most of its bits,
and it may use a rank-128 copy of the projector); seeded directions; a spread of sensitivities
within rounding (1e-6 of the largest) counts as constant; unequal sub-images have shares in
proportion.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from vispress.budget import Rounding
from vispress.errors import ConfigError
from vispress.methods.base import Compressor, Evidence, upcast
from vispress.methods.checks import check_integer, check_number
from vispress.methods.diversity import maxmin_select, unit
from vispress.methods.segments import GEOMETRY, Part, keep_by_segment
from vispress.registry import register_method
from vispress.types import Placement, Signal, Stage, TokenPlan, VisualTokens


def perturbation_scores(
    x: Float[Tensor, "B N Dv"],
    projector: Callable[[Tensor], Tensor],
    directions: Float[Tensor, "m Dv"],
    h: float,
) -> Float[Tensor, "B N"]:
    """Mean over directions u of `|P(x + h u) - P(x - h u)| / (2 h)`, one direction at a time.

    Args:
        x: Projector inputs in the precision to compute in.
        projector: P; must keep that precision.
        directions: Any length above 0; normalised here.
        h: Step.
    """
    total = torch.zeros_like(x[..., 0])
    for u in F.normalize(directions, dim=-1).to(x):
        total = total + (projector(x + h * u) - projector(x - h * u)).norm(dim=-1)
    return total / (2 * h * len(directions))


def sads_select(
    features: Float[Tensor, "B N D"], importance: Float[Tensor, "B N"], num_keep: int
) -> Int[Tensor, "B K"]:
    """Greedy max-min of cosine distance times importance scaled to [0, 1], in picking order."""
    low, high = importance.aminmax(dim=1, keepdim=True)
    spread = high - low
    flat = spread <= 1e-6 * torch.maximum(high.abs(), low.abs())
    weight = torch.where(flat, 1.0, (importance - low) / (spread + 1e-8))
    return maxmin_select(unit(features), num_keep, weight.argmax(dim=1), weight)


@final
@register_method("zoo_prune")
@dataclass(frozen=True, kw_only=True)
class ZOOPrune(Compressor):
    """Prune before the LLM, by sensitivity of the projector and diversity; 2 m projector passes.

    Args:
        m: Random directions, at least 1.
        h: Step along a direction, above 0.
        seed: Seed of the directions, at least 0; a generator of its own on the host.

    Raises:
        ConfigError: A value is out of its range.
    """

    summary: ClassVar[str] = "most sensitive under the projector, and diverse"
    paper: ClassVar[str] = "Kim et al. 2025, arXiv:2509.24837"
    evidence: ClassVar[Evidence] = "code"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY | {Signal.VISION_FEATURES, Signal.PROJECTOR}
    rounding: ClassVar[Rounding] = "floor"

    m: int = 64
    h: float = 0.01
    seed: int = 0

    def validate(self) -> None:
        check_integer("m", self.m, low=1)
        check_integer("seed", self.seed, low=0)
        check_number("h", self.h, low=0.0)
        if self.h == 0:
            raise ConfigError("h must be above 0, got 0")

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.PRE_LLM, budget=self.budget(num_layers)),)

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        assert tokens.vision_features is not None  # declared in `reads`, as the projector
        assert tokens.projector is not None
        x = upcast(tokens.vision_features)
        generator = torch.Generator("cpu").manual_seed(self.seed)
        directions = torch.randn(self.m, x.shape[-1], generator=generator)
        importance = perturbation_scores(x, tokens.projector, directions, self.h)

        def pick(part: Part) -> Tensor:
            features = tokens.features[part.rows][:, part.places]
            return sads_select(features, importance[part.rows][:, part.places], part.share)

        return TokenPlan(keep=keep_by_segment(tokens, num_keep, pick))
