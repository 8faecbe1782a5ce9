"""DivPrune: keep the most diverse visual tokens (greedy max-min over cosine distance).

Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR
2025, arXiv:2503.02175.
Source: https://github.com/vbdi/divprune at 799e2d9 (CC-BY-NC 4.0: read, not copied).
Follows the code: the first pick is the token farthest from its nearest neighbour, then always the
one farthest from all picked; all tokens of an image, newlines included, are one pool.
Differs: picked tokens are never picked again (the code repeats indices when tokens are identical);
memory is O(N D) instead of N x N beyond a few thousand tokens; at least fp32. The first pick
compares all pairs, whose number grows with N^2.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch

from vispress.methods.base import Compressor, Evidence
from vispress.registry import register_method
from vispress.types import Placement, Stage, TokenPlan, VisualTokens
from vispress_kernels.maxmin_select import maxmin_select


@final
@register_method("divprune")
@dataclass(frozen=True, kw_only=True)
class DivPrune(Compressor):
    """Prune before the LLM, by diversity of the projected tokens; the question plays no part."""

    summary: ClassVar[str] = "most diverse set: greedy max-min cosine distance"
    paper: ClassVar[str] = "Alvar et al., CVPR 2025, arXiv:2503.02175"
    evidence: ClassVar[Evidence] = "code"

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.PRE_LLM, budget=self.budget(num_layers)),)

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        order = maxmin_select(tokens.features, num_keep, backend=tokens.backend)
        return TokenPlan(keep=order.sort(dim=1).values)
