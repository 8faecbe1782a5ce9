"""SparseVLM+: SparseVLM without the pull of nearness, by the heads that look at the picture.

Zhang et al., "SparseVLM+", a preprint of its own (2025) that follows SparseVLM (ICML 2025,
arXiv:2410.04417).
Source: https://github.com/Gumpest/SparseVLMs at 26a5f48 (Apache-2.0).
Follows the code of v2.0: SparseVLM's raters; what they attend to is divided by what queries and
keys of ones would score at the same places (rotary positions alone), and of the result the 14 heads
with the largest sum over the image count. Nothing is recycled; position ids stay.
Differs: the divisor changes sign at a distance, as in the code, but is never zero; each image has
its own heads and budget; words are those behind the image, and without any the earlier tokens
stay. Schedules other than the published ones are ours.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from jaxtyping import Float
from torch import Tensor

from vispress.checks import check_choice, check_integer
from vispress.methods._parts.schedules.stage_budgets import (
    check_schedule,
    stage_budgets,
    stage_layers,
)
from vispress.methods._parts.scoring.text_raters import text_raters
from vispress.methods.base import Evidence, ScorePruner, descending, upcast
from vispress.registry import register_method
from vispress.types import Placement, Positions, Queries, Signal, Stage, VisualTokens

PUBLISHED_LAYERS = (3, 7, 16)
"""Before which tokens are dropped: after layers 2, 6 and 15."""
PRESETS = {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}
"""Tokens of 576 that each stage leaves."""
LEAST = 1e-6
"""Of the divisor's largest size; at 1e-3 other heads win than in the official code."""


@final
@register_method("sparsevlm_plus")
@dataclass(frozen=True, kw_only=True)
class SparseVLMPlus(ScorePruner):
    """Prune at several depths by the attention of visual words, freed of their positions' share.

    Without a budget the preset applies; `_parts.schedules.stage_budgets` says what others mean.

    Args:
        preset: Mean of kept tokens that the published lists are named by: 192, 128, 96 or 64.
        layers: Decoder layers before which to drop; None for the published 3, 7, 16 of 32, scaled.
        ratios: Share of the original tokens that each stage leaves, in place of the preset's.
        heads: Heads that count, those with the largest sum over raters and image; fewer where the
            layer has fewer.
    """

    summary: ClassVar[str] = "most attended by visual words, nearness divided out, in few heads"
    paper: ClassVar[str] = "Zhang et al., SparseVLM+, preprint 2025, github.com/Gumpest/SparseVLMs"
    evidence: ClassVar[Evidence] = "code"
    reads: ClassVar[frozenset[Signal]] = frozenset(
        {
            Signal.QUERY_ATTENTION,
            Signal.ROTARY_PRIOR,
            Signal.TEXT_EMBEDDINGS,
            Signal.INPUT_EMBEDDINGS,
        }
    )
    default_positions: ClassVar[Positions] = "original"

    preset: int = 192
    layers: tuple[int, ...] | None = None
    ratios: tuple[float, ...] | None = None
    heads: int = 14

    def validate(self) -> None:
        check_choice("preset", self.preset, PRESETS)
        check_schedule(self.layers, self.ratios or (1.0,) * 3, PUBLISHED_LAYERS)
        check_integer("heads", self.heads, low=1)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        layers = stage_layers(self.layers, PUBLISHED_LAYERS, num_layers)
        ratios = self.ratios or tuple(count / 576 for count in PRESETS[self.preset])
        budgets = stage_budgets(self, ratios, layers, num_layers)
        return tuple(
            Placement(stage=Stage.IN_LLM, budget=budget, layer=layer, queries=Queries.TEXT_AFTER)
            for layer, budget in zip(layers, budgets, strict=True)
        )

    def score(self, tokens: VisualTokens) -> Float[Tensor, "B N"]:
        """Average attention divided by the rotary prior over raters and chosen heads."""
        assert tokens.query_attention is not None  # declared in `reads`, as the prior is
        assert tokens.rotary_prior is not None
        chosen, prior = text_raters(tokens), upcast(tokens.rotary_prior)
        if not prior.shape[1]:  # no words: zeros
            return upcast(tokens.query_attention).sum(dim=(1, 2))
        size = prior.abs()
        size = size.maximum(LEAST * size.amax(dim=(1, 2), keepdim=True))
        weight = chosen[..., None] / size.copysign(prior)
        total = (upcast(tokens.query_attention) * weight[:, None]).sum(dim=2)  # [B, H, N]
        best = descending(total.sum(dim=2))[:, : self.heads]
        mean = total.gather(1, best[..., None].expand(-1, -1, total.shape[2])).mean(dim=1)
        return mean / chosen.sum(dim=1, keepdim=True).clamp(min=1)
