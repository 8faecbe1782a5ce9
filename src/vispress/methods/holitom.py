"""HoliTom: cut a video so that keeping once what stays the same saves most, then merge by clusters.

Shao et al., "HoliTom: Holistic Token Merging for Fast Video Large Language Models", NeurIPS 2025,
arXiv:2505.21334.
Source: the authors' code (cokeshao/HoliTom e9b2972, Apache-2.0) and its vectors.
Follows the code: dynamic programming over runs of frames, whose places that stay the same (cosine
of adjacent frames above 0.8 all along) are averaged over the run. With r of the video to be kept,
and r' as a share of what is left then, averages are merged into round(n r') clusters (DPC-KNN, as
many neighbours as centres, at most 7), a centre being 0.6 of itself and 0.4 of the others' mean; of
each frame's other tokens the ceil(n r') that the encoder's feature layer attends to most stay.
`inner`: before layer 18 of 28 half is dropped by the last prompt token's attention in the layer
before, and one after another averaged into the most similar kept token.
Differs: with a budget (ours) counts are proportional and met exactly, but a video with fewer tokens
left than that keeps those. Averages stand in the first frame of their run, in raster order.
Densities have no noise, ties keep the earlier token. `context` is ours: that branch of the code
does not run. Newlines are kept within the budget, where the code has one behind each row that still
has a token. Images pass whole.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.budget import Budget, allocate, scaled_layer
from vispress.checks import check_flag, check_integer, check_number
from vispress.errors import ConfigError
from vispress.methods._parts.geometry.segments import GEOMETRY
from vispress.methods._parts.schedules.stage_budgets import pair_budgets
from vispress.methods._parts.scoring.encoder_attention import encoder_attention
from vispress.methods._parts.video import groups as parts
from vispress.methods._parts.video.frames import frames
from vispress.methods.base import Compressor, Evidence, check_layer, top_indices, upcast
from vispress.registry import register_method
from vispress.types import Need, Placement, Queries, Signal, Stage, TokenPlan, VisualTokens
from vispress_kernels import Backend
from vispress_kernels.assign_nearest import assign_nearest

PUBLISHED_LAYER = 21  # of 32: 18 of 28
NEIGHBOURS = 7
INNER = 0.5
"""What the inner stage keeps."""


def share_of_left(retained: float, left: int, total: int) -> float:
    """Express a fraction of a video's tokens as one of those left behind averaging, at most 1."""
    return min(1.0, retained / (left / total))


def retained_counts(groups: Sequence[parts.Group], total: int, retained: float) -> tuple[int, ...]:
    """Count what the code keeps of each group, at least one token in all.

    Args:
        groups: Of one video; averages are rounded half to even, others up.
        total: Tokens of the video.
        retained: Fraction of these that is asked for.
    """
    sizes = [len(group.places) for group in groups]
    share = share_of_left(retained, sum(sizes), total)
    counts = [
        round(n * share) if group.static else math.ceil(n * share)
        for n, group in zip(sizes, groups, strict=True)
    ]
    return tuple(counts) if any(counts) else (1, *counts[1:])


@torch.no_grad()
def sequential_merge(
    x: Float[Tensor, "B N D"], keep: Int[Tensor, "B K"], backend: Backend = "auto"
) -> TokenPlan:
    """Average each dropped token, one after another, into the kept one nearest to it.

    `kept = (kept + dropped) / 2` for each: the last of m dropped tokens weighs 1/2, the kept token
    itself `2 ** -m`. Nearest is by cosine, of the tokens as they were.
    """
    rows = torch.arange(len(x), device=x.device)[:, None]
    slot, _ = assign_nearest(x, x[rows, keep], backend=backend)
    number = torch.arange(keep.shape[1], device=x.device).expand_as(keep)
    slot = slot.scatter(1, keep, number)
    dropped = torch.ones_like(slot).scatter(1, keep, 0)
    count = torch.zeros_like(keep).scatter_add(1, slot, dropped)
    # place of each token among those of its slot: the kept one first, then the dropped in order
    order = (2 * slot + dropped).argsort(dim=1, stable=True)
    start = (count + 1).cumsum(dim=1) - (count + 1)
    place = torch.arange(x.shape[1], device=x.device) - start.gather(1, slot.gather(1, order))
    rank = torch.zeros_like(slot).scatter(1, order, place)
    left = count.gather(1, slot) - (rank - 1).clamp(min=0)
    return TokenPlan(keep=keep, assign=slot, weight=torch.exp2(-left.float()))


@final
@register_method("holitom")
@dataclass(frozen=True, kw_only=True)
class HoliTom(Compressor):
    """Merge videos before the LLM, and with `inner` once more inside.

    Then `keep_ratio` is the mean over decoder layers, and `num_tokens` what is left at last.

    Args:
        retained: Without a budget: fraction kept of the video, by the code's counts, in `[0, 1]`.
        threshold: Cosine above which a place is the same in two frames, in `[-1, 1]`.
        max_window: Frames of a run at most, at least 1.
        context: Fraction of a frame's tokens that are clusters, in `[0, 1]`; 0, as published, only
            drops.
        beta: What a centre keeps of itself beside the others of its cluster, in `[0, 1]`.
        inner: Whether half is merged away inside the LLM.
        layer: Decoder layer before which that happens, at least 1; None for 18 of 28, scaled.
    """

    summary: ClassVar[str] = "of videos: what changes, and clusters of what stays the same"
    paper: ClassVar[str] = "Shao et al., NeurIPS 2025, arXiv:2505.21334"
    evidence: ClassVar[Evidence] = "code"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY | {Signal.COLUMN_ATTENTION}
    whole: ClassVar[bool] = True
    needs: ClassVar[Need | None] = "video"
    merges: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    retained: float = 0.25
    threshold: float = 0.8
    max_window: int = 1024
    context: float = 0.0
    beta: float = 0.6
    inner: bool = False
    layer: int | None = None

    def validate(self) -> None:
        check_number("threshold", self.threshold, low=-1.0, high=1.0)
        for name in ("retained", "context", "beta"):
            check_number(name, getattr(self, name), low=0.0, high=1.0)
        check_integer("max_window", self.max_window, low=1)
        check_flag("inner", self.inner)
        if self.layer is not None:
            check_integer("layer", self.layer, low=1)
            if not self.inner:
                raise ConfigError(f"layer={self.layer} is of the inner stage; give inner=True too")

    @property
    def adaptive(self) -> bool:
        """Whether the count is the code's, of what the video leaves: no budget is set."""
        return self.unbudgeted

    def signals(self) -> frozenset[Signal]:
        return self.reads | {Signal.QUERY_ATTENTION} if self.inner else self.reads

    def uncapturable(self) -> str:
        return "the host finds a video's segments and its static places"

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        if not self.inner:
            return self.before_llm(num_layers)
        layer = scaled_layer(PUBLISHED_LAYER, num_layers) if self.layer is None else self.layer
        check_layer("layer", layer, num_layers)
        before = inside = Budget(keep_ratio=1.0)
        if not self.adaptive:
            before, inside = pair_budgets(self, INNER, layer, num_layers)
        first = Placement(stage=Stage.PRE_LLM, budget=before, adaptive=self.adaptive)
        stage, last = Stage.IN_LLM, Queries.LAST
        return first, replace(first, stage=stage, budget=inside, layer=layer, queries=last)

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        if self.inner and tokens.query_attention is not None:
            score = upcast(tokens.query_attention).mean(dim=(1, 2))
            if self.adaptive:
                num_keep = min(num_keep, max(1, round(INNER * tokens.num_visual)))
            keep = top_indices(score, num_keep)
            return sequential_merge(upcast(tokens.features), keep, tokens.backend)
        video = frames(tokens, self.name)
        count, newlines = video.split(num_keep)
        x = video.of(upcast(tokens.features))
        attention = encoder_attention(tokens, "column_mean")[:, video.places]
        groups = parts.saving_groups(x, self.threshold, self.max_window)

        def merge(row: int, group: parts.Group, few: int) -> tuple[Tensor, Tensor]:
            own = group.tokens(x[row])
            context = few if group.static else few - round(few * (1 - self.context))
            score = attention[row, group.frame, group.places]
            near = min(NEIGHBOURS, context)
            into = parts.beside_top(own, score, few - context, context, near)
            return into, parts.centre_weights(into, self.beta)

        total = video.places.numel()
        counts = [
            allocate(count, retained_counts(own, total, self.retained))
            if self.adaptive
            else parts.shares(own, count)
            for own in groups
        ]
        return parts.merge_groups(video, newlines, groups, counts, merge)
