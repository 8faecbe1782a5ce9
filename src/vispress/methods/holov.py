"""HoloV: spread the budget over runs of tokens by attention and variety, then keep the attended.

Zou et al., "Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic Context
Retention", NeurIPS 2025, arXiv:2510.02912.
Source: https://github.com/obananas/HoloV at 1d2e65e (Apache-2.0).
Follows the code: a run of tokens weighs its mean of `1000 a + 0.09 v` (v: variance of cosines to
the run's other tokens, scaled to the attention a; one token alone: a); quotas are truncated, the
rest goes to the heaviest runs; inside a run attention ranks. `variant="paper"`: `a + v` for both.
Crops and frames are one sequence.
Differs: what a run cannot hold goes to the most attended tokens elsewhere (the code fills up with
zero vectors, the paper does not say how); raster order; newlines are kept within the budget (the
code drops them). `scores="column_mean"` is a reconstruction.
A run's tokens are compared in pairs: where the share that is kept stays the same, runs grow with
the picture, and time with N^2.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, final, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.checks import check_choice, check_integer, check_number
from vispress.methods._parts.geometry.segments import GEOMETRY, Part, keep_by_segment
from vispress.methods._parts.scoring.cosines import (
    MOST_PAIRS,
    equal_runs,
    side_by_side,
    unit,
)
from vispress.methods._parts.scoring.encoder_attention import (
    Scores,
    attention_signals,
    encoder_attention,
)
from vispress.methods.base import Compressor, Evidence, descending
from vispress.registry import register_method
from vispress.types import Placement, Signal, Stage, TokenPlan, VisualTokens

Variant = Literal["code", "paper"]


def cosine_variance(x: Float[Tensor, "b m d"]) -> Float[Tensor, "b m"]:
    """Compute the variance of each token's cosines to its run; its own entry counts as 0."""
    tokens, others = unit(x), x.shape[1] - 1
    block, parts = max(1, MOST_PAIRS // x.shape[1]), []
    for start in range(0, x.shape[1], block):
        cosine = tokens[:, start : start + block] @ tokens.mT
        cosine.diagonal(offset=start, dim1=1, dim2=2).zero_()
        mean = cosine.sum(dim=2, keepdim=True) / others
        parts.append((cosine - mean).square().sum(dim=2) / others)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def holistic_score(
    a: Float[Tensor, "b m"], x: Float[Tensor, "b m d"], variant: Variant, alpha: float
) -> Float[Tensor, "b m"]:
    """Add attention and variety of each token of a run."""
    if a.shape[1] == 1:
        return a
    scale, weight = (1e3, alpha) if variant == "code" else (1.0, 1.0)
    variance, a = cosine_variance(x), scale * a
    share = a.abs().mean(dim=1, keepdim=True) / (variance.abs().mean(dim=1, keepdim=True) + 1e-6)
    return a + weight * variance * share


def quotas(weight: Float[Tensor, "b P"], num_keep: int) -> Int[Tensor, "b P"]:
    """Truncate `weight * K`; one more each to the heaviest until the sum is K."""
    share = (weight * num_keep).floor().long()
    rank = descending(weight).argsort(dim=1)
    return share + (rank < num_keep - share.sum(dim=1, keepdim=True)).long()


@final
@register_method("holov")
@dataclass(frozen=True, kw_only=True)
class HoloV(Compressor):
    """Prune before the LLM, by attention within budgets of runs; the question plays no part.

    Args:
        num_crops: Runs; None for the published 1024 / K of 576 tokens, in proportion.
        alpha: Weight of variety in `variant="code"`, at least 0.
        variant: `"code"` or `"paper"`.
        scores: `"cls"`, or `"column_mean"` (mean attention received) for encoders without [CLS].
    """

    summary: ClassVar[str] = "most attended by [CLS], spread over the picture by variety"
    paper: ClassVar[str] = "Zou et al., NeurIPS 2025, arXiv:2510.02912"
    evidence: ClassVar[Evidence] = "code"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY | {Signal.CLS_ATTENTION}

    num_crops: int | None = None
    alpha: float = 0.09
    variant: Variant = "code"
    scores: Scores = "cls"

    def validate(self) -> None:
        check_choice("scores", self.scores, get_args(Scores))
        check_choice("variant", self.variant, get_args(Variant))
        check_number("alpha", self.alpha, low=0.0)
        if self.num_crops is not None:
            check_integer("num_crops", self.num_crops, low=1)

    def signals(self) -> frozenset[Signal]:
        return attention_signals(self.reads, self.scores)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.PRE_LLM, budget=self.budget(num_layers)),)

    def select(self, a: Tensor, x: Tensor, num_keep: int) -> Int[Tensor, "b K"]:
        """Take tokens within their run's quota first, then the others, by descending attention."""
        b, n = a.shape
        runs = min(n, self.num_crops or max(1, 1024 * n // (576 * num_keep)))
        both = zip(equal_runs(a, runs), equal_runs(x, runs), strict=True)
        parts = [holistic_score(*run, self.variant, self.alpha) for run in both]
        weight = side_by_side([part.mean(dim=1) for part in parts], b)
        quota = quotas(weight / (weight.sum(dim=1, keepdim=True) + 1e-6), num_keep)
        key = a if self.variant == "code" else side_by_side(parts, b)
        ranks = [descending(run).argsort(dim=1) for run in equal_runs(key, runs)]
        shares = torch.split(quota, [len(rank) // b for rank in ranks], dim=1)
        over = [rank >= own.reshape(-1, 1) for rank, own in zip(ranks, shares, strict=True)]
        best = descending(key)
        later = side_by_side(over, b).gather(1, best).to(torch.int8)
        return best.gather(1, later.argsort(dim=1, stable=True))[:, :num_keep]

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        score = encoder_attention(tokens, self.scores)

        def pick(part: Part) -> Tensor:
            return self.select(part.of(score), part.of(tokens.features), part.share)

        return TokenPlan(keep=keep_by_segment(tokens, num_keep, pick, pooled=True))
