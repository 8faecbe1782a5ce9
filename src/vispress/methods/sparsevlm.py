"""SparseVLM: drop what the text's most visual words attend to least, and recycle some of it.

Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model
Inference", ICML 2025, arXiv:2410.04417.
Source: https://github.com/Gumpest/SparseVLMs at 26a5f48, counts by rank at 91fb6d9 (Apache-2.0).
Follows the code of v1.5: raters are words above the mean of a softmax over words of `V E^T` (input
embeddings); after layers 2, 6 and 15 their attention ranks the tokens; of the dropped ones the best
30 % are clustered (DPC-KNN) into means. `rank_scale` gives v1.0's counts, `rank * scale + bias`.
Differs: a stage's budget holds its clusters (192: 309, 204, 113); a cluster stands at its centre
(the code appends it); index order in place of noise; words are those behind the image, and without
any the earlier tokens stay. Schedules other than the published ones are ours.
Clusters compare all pairs of the recycled tokens, by definition: time grows with N^2.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from vispress.budget import Budget
from vispress.checks import check_choice, check_number
from vispress.methods._parts.clustering.density_peaks import dpc_clusters
from vispress.methods._parts.schedules.stage_budgets import (
    check_schedule,
    stage_budgets,
    stage_layers,
)
from vispress.methods._parts.scoring.text_raters import relation
from vispress.methods.base import Compressor, Evidence, descending, upcast
from vispress.registry import register_method
from vispress.types import Placement, Queries, Signal, Stage, TokenPlan, VisualTokens

PUBLISHED_LAYERS = (3, 7, 16)
"""Before which tokens are dropped: after layers 2, 6 and 15."""
PRESETS = {192: (309, 204, 113), 128: (312, 117, 39), 96: (249, 55, 27), 64: (82, 32, 18)}
"""Tokens of 576 that each stage leaves, clusters included."""


def recycled(dropped: int) -> tuple[int, int]:
    """Count the dropped tokens that are recycled, and their clusters."""
    count = int(0.3 * dropped) + 1
    return count, count // 10 + 1


def kept_of(num_keep: int, num_visual: int) -> int:
    """Count the tokens that stay themselves when they and the clusters make up `num_keep`.

    All of them, without clusters, where the budget is too small for both.
    """
    for kept in range(num_keep - 1, 0, -1):
        if kept + recycled(num_visual - kept)[1] <= num_keep:
            return kept
    return num_keep


def fold_dropped(
    x: Float[Tensor, "b n d"],
    score: Float[Tensor, "b n"],
    kept: int,
    clusters: int,
    noise: Float[Tensor, "b r"] | None = None,
) -> TokenPlan:
    """Keep the best, and put means of clusters of the best dropped tokens at their centres."""
    ranked, count = descending(score), recycled(score.shape[1] - kept)[0] if clusters else 0
    first, again = ranked[:, :kept], ranked[:, kept : kept + count]
    own, one = again[..., None].expand(-1, -1, x.shape[2]), torch.ones_like(score)
    centres = label = again[:, :0]
    if clusters:
        centres, label = dpc_clusters(upcast(x.gather(1, own)), clusters, noise)
    keep, order = torch.cat([first, again.gather(1, centres)], dim=1).sort(dim=1)
    number = torch.arange(keep.shape[1], device=x.device).expand_as(keep)
    slot = torch.empty_like(order).scatter_(1, order, number)  # of what stays, of each centre
    slots = torch.cat([slot[:, :kept], slot[:, kept:].gather(1, label)], dim=1)
    assign = torch.full_like(ranked, -1).scatter_(1, ranked[:, : kept + count], slots)
    size = torch.zeros_like(one[:, :clusters]).scatter_add_(1, label, one[:, :count])
    weight = one.scatter_(1, again, size.reciprocal().gather(1, label))
    return TokenPlan(keep=keep, assign=assign, weight=weight)


@final
@register_method("sparsevlm")
@dataclass(frozen=True, kw_only=True)
class SparseVLM(Compressor):
    """Prune at several depths by the attention of visual words; recycle some of what is dropped.

    Without a budget the preset applies; `_parts.schedules.stage_budgets` says what others mean.

    Args:
        preset: Mean of kept tokens that the published lists are named by: 192, 128, 96 or 64.
        layers: Decoder layers before which to drop; None for the published 3, 7, 16 of 32, scaled.
        ratios: Share of the original tokens that each stage leaves, in place of the preset's.
        rank_scale: v1.0: each image keeps `rank * rank_scale + rank_bias` tokens and clusters, in
            place of any budget; rank is that of the raters' attention. None for v1.5.
        rank_bias: See `rank_scale`.
    """

    summary: ClassVar[str] = "most attended by visual words, with clusters of the dropped"
    paper: ClassVar[str] = "Zhang et al., ICML 2025, arXiv:2410.04417"
    evidence: ClassVar[Evidence] = "code"
    reads: ClassVar[frozenset[Signal]] = frozenset(
        {Signal.QUERY_ATTENTION, Signal.TEXT_EMBEDDINGS, Signal.INPUT_EMBEDDINGS}
    )
    merges: ClassVar[bool] = True

    preset: int = 192
    layers: tuple[int, ...] | None = None
    ratios: tuple[float, ...] | None = None
    rank_scale: float | None = None
    rank_bias: float = 0.0

    def validate(self) -> None:
        check_choice("preset", self.preset, PRESETS)
        check_schedule(self.layers, self.ratios or (1.0,) * 3, PUBLISHED_LAYERS)
        check_number("rank_bias", self.rank_bias, low=0.0)
        if self.rank_scale is not None:
            check_number("rank_scale", self.rank_scale, low=0.0)

    @property
    def adaptive(self) -> bool:
        """Whether the image decides the count."""
        return self.rank_scale is not None

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        layers = stage_layers(self.layers, PUBLISHED_LAYERS, num_layers)
        ratios = self.ratios or tuple(count / 576 for count in PRESETS[self.preset])
        budgets = stage_budgets(self, ratios, layers, num_layers)
        if self.adaptive:
            budgets = tuple(Budget(keep_ratio=1.0) for _ in layers)
        return tuple(
            Placement(
                stage=Stage.IN_LLM,
                budget=budget,
                layer=layer,
                queries=Queries.TEXT_AFTER,
                adaptive=self.adaptive,
            )
            for layer, budget in zip(layers, budgets, strict=True)
        )

    def counts(self, rows: Tensor, chosen: Tensor, most: int) -> list[int]:
        """Count tokens that stay themselves by the rank of raters' attention (v1.0; waits)."""
        ranks = [int(torch.linalg.matrix_rank(a[c])) for a, c in zip(rows, chosen, strict=True)]
        asked = [int(rank * (self.rank_scale or 0.0) + self.rank_bias) for rank in ranks]
        return [min(most, max(1, count)) for count in asked]

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        score, rows, chosen = relation(tokens)
        x, n = tokens.features, tokens.num_visual
        most = kept_of(num_keep, n)
        if not self.adaptive:
            return fold_dropped(x, score, most, num_keep - most)
        counts = self.counts(rows, chosen, most)
        plans = [
            fold_dropped(x[i : i + 1], score[i : i + 1], c, recycled(n - c)[1] * (most < num_keep))
            for i, c in enumerate(counts)
        ]
        assign, weight = zip(*((p.assign, p.weight) for p in plans), strict=True)
        keep = tuple(p.keep[0] for p in plans)
        return TokenPlan(keep=keep, assign=torch.cat(assign), weight=torch.cat(weight))
