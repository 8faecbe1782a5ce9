"""LVLM_CSP: few representatives think first, all tokens then, and those that are asked about last.

Chen et al., "LVLM_CSP: Accelerating Large Vision Language Models via Clustering, Scattering, and
Pruning for Reasoning Segmentation", 2025, arXiv:2504.10854.
Source: the abstract and a description by others, read through a specification; no code was read.
Follows: clustering (only representatives run in the early layers), scattering (all tokens run),
pruning (by the attention of the last prompt token); representatives are uniform, random or those
that [CLS] attends to.
Differs: the score is the last prompt token's, not that of a generated [SEG]; representatives by
instance masks of a detector are not offered.
Reconstructed: the other tokens bypass the early layers as identity, with their positions and
without keys or values there; the layers (8 and 16 of 32) and the counts (an eighth at either end:
34.4 % of token-layers, near the published 65 % reduction); attention is that of the layer before.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, final, get_args

import torch

from vispress.budget import Budget, check_ratio
from vispress.checks import check_choice, check_integer
from vispress.devices import sent
from vispress.errors import BudgetError
from vispress.methods._parts.schedules.stage_budgets import check_schedule, stage_layers
from vispress.methods.base import Compressor, Evidence, top_indices, upcast
from vispress.registry import register_method
from vispress.types import Placement, Positions, Queries, Signal, Stage, TokenPlan, VisualTokens

Representatives = Literal["uniform", "random", "cls"]
PUBLISHED_LAYERS = (8, 16)


@final
@register_method("lvlm_csp")
@dataclass(frozen=True, kw_only=True)
class LVLMCSP(Compressor):
    """Run early layers on representatives, middle ones on all tokens, late ones on the chosen.

    `keep_ratio` is the mean over decoder layers; `num_tokens` is what runs at either end.

    Args:
        ratio: Without a budget: share of the tokens that runs at either end, in `(0, 1]`.
        layers: Decoder layers before which the others come back, and before which tokens are
            dropped for good; None for 8 and 16 of 32, scaled.
        representatives: `"uniform"` steps, `"random"`, or the tokens most attended by `"cls"`.
        seed: Of random representatives, at least 0.
    """

    summary: ClassVar[str] = "representatives early, all tokens in the middle, the attended late"
    paper: ClassVar[str] = "Chen et al. 2025, arXiv:2504.10854"
    evidence: ClassVar[Evidence] = "reconstructed"
    reads: ClassVar[frozenset[Signal]] = frozenset({Signal.QUERY_ATTENTION})
    default_positions: ClassVar[Positions] = "original"

    ratio: float = 0.125
    layers: tuple[int, int] | None = None
    representatives: Representatives = "uniform"
    seed: int = 0

    def validate(self) -> None:
        check_ratio("ratio", self.ratio)
        check_schedule(self.layers, (1.0, 1.0), PUBLISHED_LAYERS)
        check_choice("representatives", self.representatives, get_args(Representatives))
        check_integer("seed", self.seed, low=0)

    def signals(self) -> frozenset[Signal]:
        by_cls = self.representatives == "cls"
        return self.reads | {Signal.CLS_ATTENTION} if by_cls else self.reads

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        back, last = stage_layers(self.layers, PUBLISHED_LAYERS, num_layers)
        budget = Budget(keep_ratio=self.ratio)
        if self.num_tokens is not None:
            budget = Budget(num_tokens=self.num_tokens)
        elif (mean := self.keep_ratio or self.mean_keep_ratio) is not None:
            whole = last - back
            ratio = (mean * num_layers - whole) / (num_layers - whole)
            if ratio <= 0.0:
                raise BudgetError(
                    f"a mean of {mean} over {num_layers} layers cannot be reached when all tokens "
                    f"run in layers {back} to {last - 1}; ask for more or give closer `layers`"
                )
            budget = Budget(keep_ratio=min(1.0, ratio))
        return (
            Placement(stage=Stage.SKIP, budget=budget, until=back),
            Placement(stage=Stage.IN_LLM, budget=budget, layer=last, queries=Queries.LAST),
        )

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        device, n = tokens.features.device, tokens.num_visual
        if tokens.query_attention is not None:
            attention = upcast(tokens.query_attention).mean(dim=(1, 2))
            return TokenPlan(keep=top_indices(attention, num_keep))
        if self.representatives == "cls":
            assert tokens.cls_attention is not None  # declared in `signals`
            attention = upcast(tokens.cls_attention).mean(dim=1)
            return TokenPlan(keep=top_indices(attention, num_keep))
        keep = torch.arange(num_keep) * (n // num_keep)
        if self.representatives == "random":
            generator = torch.Generator("cpu").manual_seed(self.seed)
            keep = torch.randperm(n, generator=generator)[:num_keep].sort().values
        return TokenPlan(keep=sent(keep, device).expand(tokens.batch, -1))
