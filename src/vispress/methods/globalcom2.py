"""GlobalCom2: the thumbnail decides how much each AnyRes crop keeps, and helps to choose what.

Liu et al., "Global Compression Commander" (first "Compression with Global Guidance"), AAAI 2026,
arXiv:2501.05179.
Source: https://github.com/xuyang-liu16/GlobalCom2 at 96b2d00 (Apache-2.0).
Follows the code: [CLS] logits (before the softmax) of the encoder's last layer, mean over heads; a
crop's share of the ratio is a softmax over sums of the thumbnail's scores where the crop lies; in a
crop, own and resized thumbnail scores count alike, each over its norm; one newline a row stays.
`logits=False` is the paper's attention.
Differs: the budget is met exactly, newlines included (the code truncates counts of the ratio):
what is missing goes to the crops' next tokens in turn; raster order, in the thumbnail, too; images
that are not cut have the best by score. `scores="column_mean"` is a reconstruction.
"""

from dataclasses import dataclass
from typing import ClassVar, final, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.checks import check_choice, check_flag, check_number
from vispress.methods._parts.geometry.crops import Cut, cut_of, guided_score
from vispress.methods._parts.geometry.segments import GEOMETRY
from vispress.methods._parts.scoring.encoder_attention import Scores, attention_signals
from vispress.methods.base import Compressor, Evidence, descending, top_per_segment, upcast
from vispress.registry import register_method
from vispress.types import Need, Placement, Signal, Stage, TokenPlan, VisualTokens


def crop_scales(
    thumbnail: Float[Tensor, "B s s"], cut: Cut, ratio: float, temperature: float
) -> Float[Tensor, "B m"]:
    """Give each crop the share of its tokens that it keeps, by the thumbnail's scores there."""
    high, wide = (thumbnail.shape[1] // n for n in (cut.rows, cut.cols))
    thumbnail = thumbnail.double()  # counts are truncated
    ends = [
        [*(size * i for i in range(n)), thumbnail.shape[1]]
        for size, n in ((high, cut.rows), (wide, cut.cols))
    ]
    sums = [
        thumbnail[:, ends[0][r] : ends[0][r + 1], ends[1][c] : ends[1][c + 1]].sum(dim=(1, 2))
        for r in range(cut.rows)
        for c in range(cut.cols)
    ]
    share = (torch.stack(sums, dim=1) / temperature).softmax(dim=1)
    return (ratio * (1 + share - 1 / len(sums))).clamp(max=1)


@final
@register_method("globalcom2")
@dataclass(frozen=True, kw_only=True)
class GlobalCom2(Compressor):
    """Prune AnyRes images before the LLM, guided by their thumbnail; the question plays no part.

    Args:
        temperature: Of the softmax over crops, above 0.
        logits: Scores before the softmax of the encoder's attention, as in the code.
        scores: `"cls"`, or `"column_mean"` (mean attention received) for encoders without [CLS].
    """

    summary: ClassVar[str] = "of AnyRes crops: most attended by [CLS], guided by the thumbnail"
    paper: ClassVar[str] = "Liu et al., AAAI 2026, arXiv:2501.05179"
    evidence: ClassVar[Evidence] = "code"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY | {Signal.CLS_LOGITS}
    needs: ClassVar[Need | None] = "anyres"

    temperature: float = 10.0
    logits: bool = True
    scores: Scores = "cls"

    def validate(self) -> None:
        check_choice("scores", self.scores, get_args(Scores))
        check_flag("logits", self.logits)
        check_number("temperature", self.temperature, low=1e-6)

    def signals(self) -> frozenset[Signal]:
        reads = self.reads if self.logits else GEOMETRY | {Signal.CLS_ATTENTION}
        return attention_signals(reads, self.scores)

    def encoder_layers(self, num_layers: int, feature_layer: int) -> tuple[int, ...]:
        return (num_layers - 1,)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.PRE_LLM, budget=self.budget(num_layers)),)

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        cls = tokens.cls_logits if self.logits else tokens.cls_attention
        attention = cls if self.scores == "cls" else tokens.column_attention
        assert attention is not None  # declared in `signals`
        score, segments = upcast(attention).mean(dim=1), tokens.segments()
        whole = tokens.num_visual == tokens.num_original
        cut = cut_of(tokens.crops) if whole and tokens.crops is not None else None
        newlines = int((segments[0] < 0).sum())
        if cut is None or num_keep <= newlines:
            return TokenPlan(keep=top_per_segment(score, segments, num_keep))
        ratio = (num_keep - newlines) / (tokens.num_visual - newlines)
        rank = self.surplus(score, segments[0], cut, ratio)
        order = rank.argsort(dim=1, stable=True)[:, :num_keep]
        return TokenPlan(keep=order.sort(dim=1).values)

    def surplus(
        self, score: Float[Tensor, "B N"], segment: Int[Tensor, "N"], cut: Cut, ratio: float
    ) -> Int[Tensor, "B N"]:
        """Rank each token in its sub-image, less what that one keeps; newlines come first."""
        own, crops = torch.where(segment == 0)[0], torch.where(segment > 0)[0]
        thumbnail = score[:, own].view(-1, cut.side, cut.side)
        scales = crop_scales(thumbnail, cut, ratio, self.temperature)
        guided = guided_score(score[:, crops], thumbnail, cut)
        rank = torch.full_like(score, -score.shape[1], dtype=torch.int64)
        rank[:, own] = descending(score[:, own]).argsort(dim=1) - int(len(own) * ratio)
        for crop, places in enumerate(cut.places):
            kept = (len(places) * scales[:, crop : crop + 1]).floor().long()
            rank[:, crops[places]] = descending(guided[:, places]).argsort(dim=1) - kept
        return rank
