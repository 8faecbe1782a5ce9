"""HiRED: a shallow encoder layer says how much each crop keeps, the feature layer which tokens.

Arif et al., "HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution
Vision-Language Models", AAAI 2025, arXiv:2408.10945.
Source: https://github.com/hasanar1f/HiRED at 502d6dd (MIT).
Follows the code: the thumbnail of an AnyRes image has `alpha` of the budget; of its tokens the
share `1 - alpha` that [CLS] attends to most in encoder layer 0 is marked, and the crops share the
rest by how many marks each has, truncated; tokens are those that [CLS] attends to most in the layer
that gives the features. The code counts marks in bands of the thumbnail, as many as there are crops
(what crop lies there plays no part); `marks="cells"` counts them where a crop lies, as the paper
does.
Differs: the budget is met exactly, newlines included: what truncation loses goes to each
sub-image's next tokens in turn; any number of crops works (the code needs one that divides the
thumbnail's tokens) and crops lie where they were cut (the code exchanges rows and columns). Images
that are not cut have the best by the feature layer; tiles without a thumbnail have equal shares.
`scores="column_mean"` for encoders without [CLS] is a reconstruction.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, final, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.checks import check_choice, check_number
from vispress.devices import sent
from vispress.methods._parts.geometry.crops import Cut, cut_of
from vispress.methods._parts.geometry.segments import GEOMETRY
from vispress.methods._parts.scoring.encoder_attention import (
    Scores,
    attention_signals,
    encoder_attention,
)
from vispress.methods.base import Compressor, Evidence, descending, remembered, top_per_segment
from vispress.registry import register_method
from vispress.types import Placement, Signal, Stage, TokenPlan, VisualTokens

Marks = Literal["bands", "cells"]


@remembered
def regions(side: int, rows: int, cols: int, marks: Marks) -> Int[Tensor, "s"]:
    """Give each token of a thumbnail the crop that its mark counts for, from 0."""
    place = torch.arange(side * side)
    if marks == "cells":
        return place // side * rows // side * cols + place % side * cols // side
    return place * (rows * cols) // len(place)


def crop_budgets(
    shallow: Float[Tensor, "B s"],
    region: Int[Tensor, "s"],
    sizes: Int[Tensor, "m"],
    total: int,
    marked: int,
) -> Int[Tensor, "B m"]:
    """Share a budget among crops by the most attended tokens of the thumbnail; truncated.

    Args:
        shallow: Attention to the thumbnail's tokens.
        region: Crop of each.
        sizes: Tokens of each crop, the most that it gets.
        total: What there is to share.
        marked: How many of the thumbnail's tokens count.
    """
    crop = region[descending(shallow)[:, :marked]]
    share = torch.zeros(len(shallow), len(sizes), device=shallow.device)
    share.scatter_add_(1, crop, torch.ones_like(crop, dtype=share.dtype))
    share = share / share.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.minimum((share * total).long(), sizes)


@final
@register_method("hired")
@dataclass(frozen=True, kw_only=True)
class HiRED(Compressor):
    """Prune before the LLM, AnyRes crops by what their thumbnail shows; asks no question.

    Args:
        alpha: Share of the budget that the thumbnail has, and of its tokens that are not marked, in
            `[0, 1]`.
        marks: How they are counted: `"bands"` as the code does, or `"cells"`, where each crop lies.
        scores: `"cls"`, or `"column_mean"` (mean attention received) for encoders without [CLS].
    """

    summary: ClassVar[str] = "most attended by [CLS]; a shallow layer says how much a crop keeps"
    paper: ClassVar[str] = "Arif et al., AAAI 2025, arXiv:2408.10945"
    evidence: ClassVar[Evidence] = "code"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY | {Signal.CLS_ATTENTION}

    alpha: float = 0.5
    marks: Marks = "bands"
    scores: Scores = "cls"

    def validate(self) -> None:
        check_choice("scores", self.scores, get_args(Scores))
        check_choice("marks", self.marks, get_args(Marks))
        check_number("alpha", self.alpha, low=0.0, high=1.0)

    def signals(self) -> frozenset[Signal]:
        return attention_signals(self.reads, self.scores)

    def encoder_layers(self, num_layers: int, feature_layer: int) -> tuple[int, ...]:
        return tuple(sorted({0, feature_layer}))

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.PRE_LLM, budget=self.budget(num_layers)),)

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        attention = encoder_attention(tokens, self.scores)
        shallow, deep = (attention,) * 2 if attention.ndim == 2 else attention.unbind(1)
        segments, layout = tokens.segments(), tokens.crops
        whole = tokens.num_visual == tokens.num_original
        cut = cut_of(layout) if whole and layout is not None and layout.thumbnail else None
        newlines = int((segments[0] < 0).sum())
        if cut is None or num_keep <= newlines:
            return TokenPlan(keep=top_per_segment(deep, segments, num_keep))
        rank = self.surplus(shallow, deep, segments[0], cut, num_keep - newlines)
        order = rank.argsort(dim=1, stable=True)[:, :num_keep]
        return TokenPlan(keep=order.sort(dim=1).values)

    def surplus(
        self,
        shallow: Float[Tensor, "B N"],
        deep: Float[Tensor, "B N"],
        segment: Int[Tensor, "N"],
        cut: Cut,
        budget: int,
    ) -> Int[Tensor, "B N"]:
        """Rank each token in its sub-image, less what that one keeps; newlines come first."""
        device, area = deep.device, cut.side**2
        region = regions(cut.side, cut.rows, cut.cols, self.marks)
        own = sent(torch.where(segment == 0)[0], device)
        sizes = torch.tensor([len(places) for places in cut.places])
        first = min(int(budget * self.alpha), area)
        rest = min(budget - first, int(sizes.sum()))
        marked = int(area * (1 - self.alpha))
        shares = crop_budgets(
            shallow[:, own], sent(region, device), sent(sizes, device), rest, marked
        )
        rank = torch.full_like(deep, -deep.shape[1], dtype=torch.int64)
        rank[:, own] = descending(deep[:, own]).argsort(dim=1) - first
        crops = torch.where(segment > 0)[0]
        for crop, places in enumerate(cut.places):
            at = sent(crops[places], device)
            rank[:, at] = descending(deep[:, at]).argsort(dim=1) - shares[:, crop : crop + 1]
        return rank
