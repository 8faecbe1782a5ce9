"""VScan: global and local encoder attention before the LLM, text attention in its middle.

Zhang et al., "VScan: Rethinking Visual Token Reduction for Efficient Large Vision-Language Models",
TMLR 2026, arXiv:2505.22654.
Source: the authors' code (Tencent/SelfEvolvingAgent a82450e, MIT) and its vectors; its stage in the
LLM is PyramidDrop's code.
Follows the code: half of the tokens by the attention of a shallow encoder layer (5 of 24), equally
many in each of 4 x 4 windows; the others by that of the feature layer, over the whole picture;
every dropped token is averaged into its most similar kept one (cosine, projected tokens). Before
layer 16 of 32 the last prompt token's attention in that layer leaves a third.
Differs: the code loses what the windows do not share out evenly (45 of 58 stay) and fails below 32
tokens, here the global half has it; crops and frames are scanned on their own, newlines stay.
`scores="column_mean"` is, but for windows of merged tokens, the code's Qwen port.
"""

from dataclasses import dataclass
from typing import ClassVar, final, get_args

import torch
from torch import Tensor

from vispress.budget import scaled_layer
from vispress.checks import check_choice, check_integer
from vispress.methods._parts.clustering.owners import mean_plan
from vispress.methods._parts.geometry.segments import GEOMETRY, Part, owner_by_segment
from vispress.methods._parts.geometry.windows import owners, windows
from vispress.methods._parts.schedules.stage_budgets import entry_budgets
from vispress.methods._parts.scoring.encoder_attention import (
    Scores,
    attention_signals,
    encoder_attention,
)
from vispress.methods.base import Compressor, Evidence, check_layer, top_indices, upcast
from vispress.registry import register_method
from vispress.types import Placement, Queries, Signal, Stage, TokenPlan, VisualTokens

PUBLISHED_LAYER = 16
PUBLISHED_SHALLOW, PUBLISHED_ENCODER_DEPTH = 5, 24
ENTRY = 1.5
"""Tokens that enter the LLM, of the mean over its layers."""


@final
@register_method("vscan")
@dataclass(frozen=True, kw_only=True)
class VScan(Compressor):
    """Prune and merge before the LLM by two encoder layers, and prune again in its middle.

    `keep_ratio` is the mean over decoder layers: 1.5 times it before the LLM. `num_tokens` is what
    the second placement leaves, a third of the first.

    Args:
        layer: Decoder layer before which tokens are dropped again; None for 16 of 32, scaled.
        shallow: Encoder layer of the local scores; None for 5 of 24, scaled.
        scores: `"cls"`, or `"column_mean"` (mean attention received) for encoders without [CLS].
    """

    summary: ClassVar[str] = "most attended by [CLS] near and far, merged, then by the text"
    paper: ClassVar[str] = "Zhang et al., TMLR 2026, arXiv:2505.22654"
    evidence: ClassVar[Evidence] = "code"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY | {
        Signal.CLS_ATTENTION,
        Signal.QUERY_ATTENTION,
    }
    merges: ClassVar[bool] = True

    layer: int | None = None
    shallow: int | None = None
    scores: Scores = "cls"

    def validate(self) -> None:
        check_choice("scores", self.scores, get_args(Scores))
        if self.layer is not None:
            check_integer("layer", self.layer, low=1)
        if self.shallow is not None:
            check_integer("shallow", self.shallow, low=0)

    def signals(self) -> frozenset[Signal]:
        return attention_signals(self.reads, self.scores)

    def encoder_layers(self, num_layers: int, feature_layer: int) -> tuple[int, ...]:
        shallow = PUBLISHED_SHALLOW * num_layers // PUBLISHED_ENCODER_DEPTH
        shallow = shallow if self.shallow is None else self.shallow
        return tuple(sorted({min(shallow, feature_layer), feature_layer}))

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        layer = scaled_layer(PUBLISHED_LAYER, num_layers) if self.layer is None else self.layer
        check_layer("layer", layer, num_layers)
        first, second = entry_budgets(self, ENTRY, layer, num_layers)
        return (
            Placement(stage=Stage.PRE_LLM, budget=first),
            Placement(
                stage=Stage.IN_LLM,
                budget=second,
                layer=layer,
                queries=Queries.LAST,
                attention_of="next",
            ),
        )

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        if tokens.query_attention is not None:
            score = upcast(tokens.query_attention).mean(dim=(1, 2))
            return TokenPlan(keep=top_indices(score, num_keep))
        attention = encoder_attention(tokens, self.scores)
        local, whole = (attention, attention) if attention.ndim == 2 else attention.unbind(1)
        x, window = upcast(tokens.features), windows(tokens)

        def own(part: Part) -> Tensor:
            here, near, far, there = (part.of(each) for each in (x, local, whole, window))
            return owners(here, near, far, there, part.share, tokens.backend)

        return mean_plan(owner_by_segment(tokens, num_keep, own), [num_keep])
