"""PruneVid: average what stays the same in a scene, merge by clusters, then prune by the text.

Huang et al., "PruneVid: Visual Token Pruning for Efficient Video Large Language Models", Findings
of ACL 2025, arXiv:2412.16117.
Source: the authors' code (Visual-AI/PruneVid b12600c, for PLLaVA, CC BY-NC-SA 4.0; facts alone are
used) and its vectors.
Follows the code: scenes are clusters (DPC-KNN) of the frames' means, a quarter as many as frames,
made into runs; a place whose tokens have a mean cosine above 0.8 over a scene is averaged over it;
the averages of a scene, and the others of each frame, are merged into half as many clusters (14 or
fewer stay). Of each of these groups 0.4 are kept behind layer 10 of 32, rounded down, which is
nothing of two: those with the largest attention (over heads and words) that any word behind the
video pays them there.
Differs: a budget (ours) has every group merged, and later kept, to the same share, to its count; a
video whose averages are fewer than that keeps fewer. One token stays where the code would keep
none. Averages stand in the first frame of their scene, in raster order. Layers in front of the
second stage keep their KV cache, where the code cuts all. Videos of fewer than seven frames work.
The densities have no noise. Newlines are kept within the budget. Images pass whole. With no word
behind the video the earlier tokens of groups stay.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.budget import Budget, allocate, scaled_layer
from vispress.checks import check_integer, check_number
from vispress.devices import sent
from vispress.methods._parts.geometry.segments import GEOMETRY
from vispress.methods._parts.schedules.stage_budgets import pair_budgets
from vispress.methods._parts.video import groups as parts
from vispress.methods._parts.video.frames import frames
from vispress.methods.base import (
    Compressor,
    Evidence,
    check_layer,
    descending,
    top_indices,
    top_per_segment,
    upcast,
)
from vispress.registry import register_method
from vispress.types import Need, Placement, Queries, Signal, Stage, TokenPlan, VisualTokens

PUBLISHED_LAYER = 11
NEIGHBOURS = 7


def top_of_groups(
    score: Float[Tensor, "N"], group: Int[Tensor, "N"], share: float, num_keep: int
) -> Int[Tensor, "K"]:
    """Find the highest scores of each group, as many as a share of it has, rounded down.

    Args:
        score: Higher = kept.
        group: On the host; number of each token's group, -1 for newlines, which stay.
        share: Of each group.
        num_keep: The most that may stay; of all groups less, where that is not enough.

    Returns:
        Ascending; the best token of all where no group keeps one.
    """
    numbers, sizes = torch.unique(group[group >= 0], return_counts=True)
    few = [int(share * size) for size in sizes.tolist()]
    if not any(few):
        best = int(
            descending(score[None].masked_fill(sent(group < 0, score.device), -torch.inf))[0, 0]
        )
        few[int((numbers == group[best]).nonzero())] = 1
    lines = torch.where(group < 0)[0][: max(0, num_keep - sum(few))]
    kept = [sent(lines, score.device)]
    for number, count in zip(numbers, allocate(num_keep - len(lines), few), strict=True):
        places = sent(torch.where(group == number)[0], score.device)
        kept.append(places[top_indices(score[None, places], count)[0]])
    return torch.cat(kept).sort().values


@final
@register_method("prunevid")
@dataclass(frozen=True, kw_only=True)
class PruneVid(Compressor):
    """Merge videos before the LLM, prune them inside; without a budget the video decides.

    Args:
        scenes: Scenes that are looked for, as a fraction of the frames, in `[0, 1]`.
        threshold: Mean cosine above which a place stays the same, in `[-1, 1]`.
        merged: Without a budget: clusters, as a fraction of a group, in `[0, 1]`.
        attended: What the second stage keeps of the first, in `[0.01, 1]`; without a budget of each
            group.
        layer: Decoder layer before which it acts, at least 1; None for 11 of 32, scaled.
    """

    summary: ClassVar[str] = "of videos: averages and clusters of scenes, then by the text"
    paper: ClassVar[str] = "Huang et al., Findings of ACL 2025, arXiv:2412.16117"
    evidence: ClassVar[Evidence] = "code"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY | {
        Signal.QUERY_ATTENTION,
        Signal.INPUT_EMBEDDINGS,
    }
    whole: ClassVar[bool] = True
    needs: ClassVar[Need | None] = "video"
    merges: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    scenes: float = 0.25
    threshold: float = 0.8
    merged: float = 0.5
    attended: float = 0.4
    layer: int | None = None

    def validate(self) -> None:
        check_number("threshold", self.threshold, low=-1.0, high=1.0)
        check_number("attended", self.attended, low=0.01, high=1.0)
        for name in ("scenes", "merged"):
            check_number(name, getattr(self, name), low=0.0, high=1.0)
        if self.layer is not None:
            check_integer("layer", self.layer, low=1)

    @property
    def adaptive(self) -> bool:
        """Whether no budget is set."""
        return self.unbudgeted

    def uncapturable(self) -> str:
        return "the host finds a video's segments and its static places"

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        layer = scaled_layer(PUBLISHED_LAYER, num_layers) if self.layer is None else self.layer
        check_layer("layer", layer, num_layers)
        budgets = (Budget(keep_ratio=1.0),) * 2
        if not self.adaptive:
            budgets = pair_budgets(self, self.attended, layer, num_layers)
        first = Placement(stage=Stage.PRE_LLM, budget=budgets[0], adaptive=self.adaptive)
        stage, words = Stage.IN_LLM, Queries.TEXT_AFTER
        return first, replace(first, stage=stage, budget=budgets[1], layer=layer, queries=words)

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        if tokens.query_attention is not None:
            return self.attend(tokens, num_keep)
        video = frames(tokens, self.name)
        count, newlines = video.split(num_keep)
        x = video.of(upcast(tokens.features))
        groups = self.groups(x)

        def merge(row: int, group: parts.Group, few: int) -> tuple[Tensor, Tensor]:
            into = parts.clusters(group.tokens(x[row]), few, NEIGHBOURS)
            return into, parts.mean_weights(into)

        share = self.merged if self.adaptive else 1.0
        counts = [parts.shares(own, count, share) for own in groups]
        return parts.merge_groups(video, newlines, groups, counts, merge)

    def groups(self, x: Float[Tensor, "B F t D"]) -> list[list[parts.Group]]:
        """Group each video; the groups are found again in the LLM's input for the second stage."""
        return parts.static_groups(x, self.scenes, self.threshold, NEIGHBOURS)

    def attend(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        """Keep the most attended of each group: the second stage. Waits once for the device."""
        assert tokens.input_embeddings is not None
        assert tokens.query_attention is not None
        video = frames(tokens, self.name, pruned=True)
        groups = self.groups(video.of(upcast(tokens.input_embeddings)))
        attention = upcast(tokens.query_attention).flatten(1, 2)
        if not attention.shape[1]:
            attention = attention.new_zeros(tokens.batch, 1, tokens.num_visual)
        score = attention.amax(dim=1)
        number = torch.full((tokens.batch, tokens.num_original), -1, device=tokens.index.device)
        for b, own in enumerate(groups):
            for i, group in enumerate(own):
                number[b, video.places[group.frame : group.frame + group.length, group.places]] = i
        group_of = number.gather(1, tokens.index).cpu()
        if not self.adaptive:
            return TokenPlan(keep=top_per_segment(score, group_of, num_keep))
        rows = zip(score, group_of, strict=True)
        kept = tuple(top_of_groups(own, group, self.attended, num_keep) for own, group in rows)
        alike = len({len(row) for row in kept}) == 1
        return TokenPlan(keep=torch.stack(kept) if alike else kept)
