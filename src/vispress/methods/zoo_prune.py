"""ZOO-Prune: keep tokens to which the projector is sensitive and that differ from each other.

Kim et al., "Training-free Token Pruning via Zeroth-Order Gradient Estimation in Vision-Language
Models", CVPR 2026, arXiv:2509.24837.
Source: https://github.com/AIM-SKKU/ZOO-Prune at 159f7f9, AnyRes at 2d1194b (no licence file: read,
not copied).
Follows the code where its docstrings disagree: sensitivity is the *mean* over directions,
diversity is measured on *projected* tokens; sub-images and frames are selected on their own.
Differs: the exact projector in at least fp32 (the code's fp16 step of 0.01 loses most of its bits,
and it may use a rank-128 copy of the projector); one second-layer product a direction where the
projector is a two-layer MLP (or a merger: a norm and such an MLP), as the difference can be taken
before it (and rounded after it to the dtype of fp16 and bf16 weights); seeded directions; a spread
of sensitivities within rounding (1e-6 of the largest) counts as constant; unequal sub-images have
shares in proportion. `average="rms"` is ours: nearly the same scores, at a sixtieth of the work
where no norm stands before the MLP.
Scores take time linear in N; choosing K tokens that differ, in K N.
"""

from dataclasses import dataclass
from typing import ClassVar, final, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from vispress.budget import Rounding
from vispress.checks import check_choice, check_integer, check_number
from vispress.errors import ConfigError
from vispress.methods._parts.geometry.segments import GEOMETRY, Part, keep_by_segment
from vispress.methods._parts.scoring.sensitivity import Average, sensitivity
from vispress.methods.base import Compressor, Evidence
from vispress.registry import register_method
from vispress.types import Placement, Signal, Stage, TokenPlan, VisualTokens
from vispress_kernels import Backend
from vispress_kernels.maxmin_select import maxmin_select


def sads_select(
    features: Float[Tensor, "B N D"],
    importance: Float[Tensor, "B N"],
    num_keep: int,
    backend: Backend = "auto",
) -> Int[Tensor, "B K"]:
    """Choose by greedy max-min of cosine distance times importance in [0, 1], in picking order."""
    low, high = importance.aminmax(dim=1, keepdim=True)
    spread = high - low
    flat = spread <= 1e-6 * torch.maximum(high.abs(), low.abs())
    weight = torch.where(flat, 1.0, (importance - low) / (spread + 1e-8))
    return maxmin_select(features, num_keep, weight=weight, backend=backend)


@final
@register_method("zoo_prune")
@dataclass(frozen=True, kw_only=True)
class ZOOPrune(Compressor):
    """Prune before the LLM, by sensitivity of the projector and diversity.

    Args:
        m: Random directions, at least 1.
        h: Step along a direction, above 0.
        seed: Seed of the directions, at least 0; a generator of its own on the host.
        average: Over directions: `"mean"` (published) or `"rms"` (all in one product, if no norm
            stands before the MLP).

    Raises:
        ConfigError: A value is out of its range.
    """

    summary: ClassVar[str] = "most sensitive under the projector, and diverse"
    paper: ClassVar[str] = "Kim et al., CVPR 2026, arXiv:2509.24837"
    evidence: ClassVar[Evidence] = "code"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY | {Signal.VISION_FEATURES, Signal.PROJECTOR}
    rounding: ClassVar[Rounding] = "floor"

    m: int = 64
    h: float = 0.01
    seed: int = 0
    average: Average = "mean"

    def validate(self) -> None:
        check_choice("average", self.average, get_args(Average))
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
        generator = torch.Generator("cpu").manual_seed(self.seed)
        drawn = torch.randn(self.m, tokens.vision_features.shape[-1], generator=generator)
        importance = sensitivity(tokens, F.normalize(drawn, dim=-1), self.h, self.average)

        def pick(part: Part) -> Tensor:
            features, weight = part.of(tokens.features), part.of(importance)
            return sads_select(features, weight, part.share, tokens.backend)

        return TokenPlan(keep=keep_by_segment(tokens, num_keep, pick))
