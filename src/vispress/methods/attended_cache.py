"""AttendedCache: evict from the KV cache what the end of the prompt attends to least.

Control for methods that evict behind the prefill: the plain rule that most of them refine. Nothing
is published under this name. The first answer token is computed on the whole picture, all later
ones see what is left of it; text stays cached.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from vispress.checks import check_flag, check_integer
from vispress.methods.base import Compressor, Evidence, check_layer, top_indices, upcast
from vispress.methods.cache_evictor import CachedTokens, CacheEvictor, CachePlan
from vispress.registry import register_method
from vispress.types import Placement, Positions, Stage, TokenPlan, VisualTokens


@final
@register_method("attended_cache")
@dataclass(frozen=True, kw_only=True)
class AttendedCache(CacheEvictor, Compressor):
    """Keep cached, in every layer, the visual tokens that the prompt's last token attends to most.

    Args:
        keep_ratio: Fraction of the image's tokens that reach a layer and stay in its cache.
        num_tokens: Tokens of each image that stay, in place of `keep_ratio`.
        layer: First decoder layer whose cache is cut, in `[0, num_layers)`.
        per_head: Each KV head keeps its own tokens, by the attention of its group of query heads;
            False: all heads keep the same, by the mean over heads.

    Raises:
        ConfigError: A value is out of its range.
        BudgetError: So is a budget.
    """

    summary: ClassVar[str] = "all in the prefill; cached, those most attended by the prompt's end"
    paper: ClassVar[str] = "control"
    evidence: ClassVar[Evidence] = "control"
    default_positions: ClassVar[Positions] = "original"

    layer: int = 0
    per_head: bool = True

    def validate(self) -> None:
        check_integer("layer", self.layer, low=0)
        check_flag("per_head", self.per_head)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        check_layer("layer", self.layer, num_layers, low=0)
        budget = self.budget(num_layers, self.layer)
        return (Placement(stage=Stage.CACHE, budget=budget, layer=self.layer),)

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        """Keep every token in the prefill."""
        every = torch.arange(tokens.num_visual, device=tokens.features.device)
        return TokenPlan(keep=every.expand(tokens.batch, -1).contiguous())

    @torch.no_grad()
    def plan_cache(self, tokens: CachedTokens, num_keep: int) -> CachePlan:
        """Keep the most attended; ties keep the earlier token."""
        score: Tensor = upcast(tokens.attention).mean(dim=2)  # [B, H, N]
        if self.per_head:
            B, _, N = score.shape
            score = score.view(B, tokens.keys.shape[1], -1, N).sum(dim=2)
        else:
            score = score.mean(dim=1, keepdim=True)
        kept = top_indices(score.flatten(0, 1), num_keep)
        return CachePlan(keep=kept.view(*score.shape[:2], num_keep))
