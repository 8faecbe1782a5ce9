"""FrameFusion: merge what stays the same from frame to frame, layer by layer, then prune once.

Fu et al., "FrameFusion: Combining Similarity and Importance for Video Token Reduction on Large
Vision Language Models", ICCV 2025, arXiv:2501.01986.
Source: the authors' code (thu-nics/FrameFusion fbec1d2, MIT) and its vectors.
Follows the code: at the LLM's input and then layer by layer, hidden states that have a cosine of at
least 0.6 to the one before at their place are merged into it, and runs of them become the mean in
the run's first token. Where a layer merges less than a tenth of what is left (newlines count there,
too), the next layer prunes: the tokens that the prompt's last token attends to most in the layer
before (mean over heads) stay, as many as make the mean over decoder layers the budget. Where a
layer could merge as many as that budget asks for or more, the most alike are, the number merged
rounded down, and nothing more is done.
Differs: the code merges and prunes between a layer's attention and its MLP, here that happens
before the next layer; its budget is of 28 layers for every LLM, here of the LLM's own. Merging ends
in any case where the budget could else be overspent: before layer 8 of 28 for 0.3. `num_tokens`
(ours) is what is left in the end. Newlines are never merged, and a prune keeps them within the
budget, where the code ranks them. Images pass whole.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.budget import Budget, ratio_for_mean, ratio_left
from vispress.checks import check_choice, check_number
from vispress.kinds import Need, Positions, Queries, Signal, Stage
from vispress.methods._parts.clustering.owners import mean_plan
from vispress.methods._parts.geometry.segments import GEOMETRY
from vispress.methods._parts.video.frames import frames
from vispress.methods._parts.video.temporal_runs import likeness, run_starts
from vispress.methods.base import Compressor, Evidence, top_indices, upcast
from vispress.registry import register_method
from vispress.types import Memory, Placement, TokenPlan, VisualTokens, full_index

PUBLISHED_MEAN = 0.3


def last_layer(mean: float, num_layers: int) -> int:
    """Find the layer, at least 1, up to which all tokens may stay without using up the mean."""
    return max(1, math.ceil(mean * num_layers) - 1)


@dataclass(frozen=True)
class MeanBudgetTracker:
    """What each layer so far has seen, of a budget that is met as a mean over layers.

    Args:
        shares: Of the tokens that entered the LLM, one a layer.
        merging: Whether merging goes on.
    """

    shares: tuple[float, ...] = ()
    merging: bool = True

    def goal(self, mean: float, num_layers: int, entered: int) -> int:
        """Count what the next layer and all behind it may see, for this mean over layers."""
        ratio = min(1.0, ratio_left(mean, self.shares, num_layers))
        return Budget(keep_ratio=ratio).resolve(entered)

    def room(self, mean: float, num_layers: int) -> float:
        """Find the fraction of what is left that may still be merged, for this mean over layers."""
        share, layers = (self.shares or (1.0,))[-1], num_layers - len(self.shares)
        return max(0.0, 1 - (mean * num_layers - math.fsum(self.shares)) / (layers * share))

    def after(self, left: int, entered: int, least: float) -> "MeanBudgetTracker":
        """Track one more layer, which sees `left` tokens.

        Merging ends where it took less than `least` of what there was.
        """
        share = left / entered
        before = self.shares[-1] if self.shares else 1.0
        return replace(
            self,
            shares=(*self.shares, share),
            merging=self.merging and 1 - share / before >= least,
        )

    def memory(self, last: int, *, over: bool) -> Memory:
        """Make what the runtime carries on; `last`: the layer of the last placement."""
        prunes = not self.merging or len(self.shares) == last
        return Memory(value=self, attention=prunes, over=over)


@final
@register_method("framefusion")
@dataclass(frozen=True, kw_only=True)
class FrameFusion(Compressor):
    """Merge videos in the LLM's first layers, then prune them; without a budget to a mean of 0.3.

    `keep_ratio` is the mean over decoder layers, as `mean_keep_ratio`: that is met, what is left
    where the video decides. `num_tokens` is what is left in the end.

    Args:
        threshold: Cosine from which a token is merged into the one before it, in `[-1, 1]`.
        least: Merging ends where it takes less than this share of what is left, in `[0, 1]`.
        queries: Whose attention ranks tokens in the prune: the prompt's `"last"` token, as in the
            code; the `"last_four"` (mean), as in the code for Qwen2-VL; or `"all"` (ours).
    """

    summary: ClassVar[str] = "of videos: means of what stays the same, then the most attended"
    paper: ClassVar[str] = "Fu et al., ICCV 2025, arXiv:2501.01986"
    evidence: ClassVar[Evidence] = "code"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY | {Signal.QUERY_ATTENTION, Signal.DEPTH}
    whole: ClassVar[bool] = True
    needs: ClassVar[Need | None] = "video"
    merges: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    default_positions: ClassVar[Positions] = "original"

    threshold: float = 0.6
    least: float = 0.1
    queries: Literal["last", "last_four", "all"] = "last"

    def validate(self) -> None:
        check_number("threshold", self.threshold, low=-1.0, high=1.0)
        check_number("least", self.least, low=0.0, high=1.0)
        check_choice("queries", self.queries, ("last", "last_four", "all"))

    @property
    def mean(self) -> float:
        """Of visual tokens, over decoder layers."""
        given = self.mean_keep_ratio if self.keep_ratio is None else self.keep_ratio
        return PUBLISHED_MEAN if given is None else given

    def uncapturable(self) -> str:
        return "a video decides how many of its tokens are merged"

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        first = Placement(stage=Stage.PRE_LLM, budget=Budget(keep_ratio=1.0), adaptive=True)
        if self.mean == 1.0:
            return (replace(first, adaptive=False),)
        end = Budget(keep_ratio=self.mean, rounding="ceil")
        if self.num_tokens is not None:
            end = Budget(num_tokens=self.num_tokens)
        else:
            ratio_for_mean(self.mean, 1, num_layers)  # refuses what cannot be met
        last = last_layer(self.mean, num_layers)
        inside = replace(first, stage=Stage.IN_LLM, queries=Queries(self.queries))
        middle = (replace(inside, layer=layer) for layer in range(1, last))
        return first, *middle, replace(inside, layer=last, budget=end)

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        assert tokens.depth is not None  # declared in `reads`
        # one tracker for all rows: they part where their counts do
        tracker = tokens.memory[0].value if tokens.memory else MeanBudgetTracker()
        assert isinstance(tracker, MeanBudgetTracker)
        layer, depth = tokens.depth
        last = last_layer(self.mean, depth)
        entered = tokens.num_entered or tokens.num_original
        count = tokens.num_visual
        goal, most = tracker.goal(self.mean, depth, entered), tracker.room(self.mean, depth) * count
        if self.num_tokens is not None:
            goal, most = self.num_tokens, float(count - self.num_tokens)
        goal = min(goal, num_keep, count)

        video = frames(tokens, self.name, pruned=bool(tokens.memory))
        place = video.place_of(tokens.index)
        if layer == last or num_keep < count or not tracker.merging:
            newlines_stay = len(video.split(goal)[1]) > 0
            owner, left = self._pruned(tokens, place, goal, newlines_stay)
            over = [True] * tokens.batch
        else:
            owner, left, over = self._merged(tokens, place, most)

        memory = tuple(
            tracker.after(own, entered, self.least).memory(last, over=ends)
            for own, ends in zip(left, over, strict=True)
        )
        if min(left) == count:
            whole = full_index(tokens.batch, count, owner.device)
            return TokenPlan(keep=whole, memory=memory)
        weights = upcast(tokens.features[:0]).dtype
        return replace(mean_plan(owner, left, weights), memory=memory)

    def _pruned(
        self, tokens: VisualTokens, place: Int[Tensor, "B N"], goal: int, newlines_stay: bool
    ) -> tuple[Int[Tensor, "B N"], list[int]]:
        """Keep the most attended: owners, -1 for what goes, and what is left of each row."""
        assert tokens.query_attention is not None
        score: Float[Tensor, "B N"] = upcast(tokens.query_attention).mean(dim=(1, 2))
        newline = float("inf") if newlines_stay else float("-inf")
        kept = top_indices(score.masked_fill(place < 0, newline), goal)
        return torch.full_like(place, -1).scatter(1, kept, kept), [goal] * tokens.batch

    def _merged(
        self, tokens: VisualTokens, place: Int[Tensor, "B N"], most: float
    ) -> tuple[Int[Tensor, "B N"], list[int], list[bool]]:
        """Merge what stays the same, `most` of it: owners, what is left, and whether all is done.

        `most` is no integer where a mean over layers asks for it.
        """
        alike = likeness(upcast(tokens.features), place)
        found = (alike >= self.threshold).sum(dim=1).tolist()  # waits once for the device
        merges = [min(many, max(0, int(most))) for many in found]
        left = [tokens.num_visual - own for own in merges]
        return run_starts(alike, place, merges), left, [many >= most for many in found]
