"""VisionZip: keep the tokens [CLS] attends to most, and fold the rest into a few contextual ones.

Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models", CVPR 2025,
arXiv:2412.04467.
Source: https://github.com/dvlab-research/VisionZip at 3151f6d (Apache-2.0).
Follows the code: targets at equal steps over the remaining tokens; every other token goes to the
target with the most similar encoder keys (mean over heads); a contextual token is its target
*plus* the mean of what it got (not the mean of the group), before the projector.
Differs: the encoder's [CLS] token itself is no visual token here and is not forwarded (the code's
`dominant` counts it); tokens stay in raster order, contextual ones at their target's place (the
code appends them); AnyRes newlines are kept within the budget. `scores="column_mean"` for encoders
without [CLS] follows a third-party port.
"""

from dataclasses import dataclass
from typing import ClassVar, final, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.checks import check_choice, check_integer
from vispress.methods._parts.clustering.owners import kept_and_slots
from vispress.methods._parts.geometry.segments import GEOMETRY, Part, owner_by_segment
from vispress.methods._parts.scoring.encoder_attention import (
    Scores,
    attention_signals,
    encoder_attention,
)
from vispress.methods.base import Compressor, Evidence, descending, upcast
from vispress.registry import register_method
from vispress.types import Placement, Signal, Stage, TokenPlan, VisualTokens
from vispress_kernels import Backend
from vispress_kernels.assign_nearest import assign_nearest

PUBLISHED_SHARE = 10 / 64
"""Contextual tokens among all kept, in the published 54 + 10, 108 + 20 and 162 + 30."""


def owners(
    score: Float[Tensor, "b n"],
    metric: Float[Tensor, "b n d"],
    dominant: int,
    contextual: int,
    backend: Backend = "auto",
) -> Int[Tensor, "b n"]:
    """Find the token that each one is folded into: itself if it stays, -1 where there is none.

    Targets are every step-th of the rest, the first `contextual`; cosines in `metric` choose one.
    """
    rest = descending(score)[:, dominant:].sort(dim=1).values
    owner = torch.arange(score.shape[1], device=score.device).expand(score.shape)
    if not contextual:
        return owner.scatter(1, rest, -1)
    target = rest[:, :: max(1, rest.shape[1] // contextual)][:, :contextual]
    x, y = (metric.take_along_dim(part[..., None], dim=1) for part in (rest, target))
    into = target.gather(1, assign_nearest(x, y, backend=backend)[0])
    return owner.scatter(1, rest, into).scatter_(1, target, target)


@final
@register_method("visionzip")
@dataclass(frozen=True, kw_only=True)
class VisionZip(Compressor):
    """Prune and merge before the projector; the question plays no part.

    Args:
        contextual: Merged tokens among the kept of each sub-image (all, if that keeps no more);
            None for the published 10 of 64.
        scores: `"cls"`, or `"column_mean"` (mean attention received) for encoders without [CLS].

    Raises:
        ConfigError: A value is out of its range.
    """

    summary: ClassVar[str] = "most attended by [CLS]; the rest folded into contextual tokens"
    paper: ClassVar[str] = "Yang et al., CVPR 2025, arXiv:2412.04467"
    evidence: ClassVar[Evidence] = "code"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY | {
        Signal.CLS_ATTENTION,
        Signal.VISION_KEYS,
        Signal.VISION_FEATURES,
        Signal.PROJECTOR,
    }
    merges: ClassVar[bool] = True

    contextual: int | None = None
    scores: Scores = "cls"

    def validate(self) -> None:
        check_choice("scores", self.scores, get_args(Scores))
        if self.contextual is not None:
            check_integer("contextual", self.contextual, low=0)

    def signals(self) -> frozenset[Signal]:
        return attention_signals(self.reads, self.scores)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.PRE_LLM, budget=self.budget(num_layers)),)

    def split_budget(self, num_keep: int) -> tuple[int, int]:
        """Split a sub-image's budget into dominant and contextual tokens."""
        asked = round(num_keep * PUBLISHED_SHARE) if self.contextual is None else self.contextual
        return num_keep - min(asked, num_keep), min(asked, num_keep)

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        assert tokens.vision_keys is not None  # declared in `reads`
        score, keys = encoder_attention(tokens, self.scores), upcast(tokens.vision_keys).mean(dim=1)

        def own(part: Part) -> Tensor:
            counts = self.split_budget(part.share)
            return owners(part.of(score), part.of(keys), *counts, tokens.backend)

        owner = owner_by_segment(tokens, num_keep, own)
        keep, slots = kept_and_slots(owner, num_keep)
        # a target itself counts whole, beside the mean of what is folded into it
        folded = (owner >= 0) & (owner != torch.arange(owner.shape[1], device=owner.device))
        into = owner.clamp(min=0)
        count = torch.zeros_like(score).scatter_add_(1, into, folded.to(score)).gather(1, into)
        weight = torch.where(folded, count.clamp(min=1).reciprocal(), 1.0)
        return TokenPlan(keep=keep, assign=slots, weight=weight, merge_on="vision_features")
