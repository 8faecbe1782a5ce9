"""No image: drop every visual token, to see what the language model answers without looking.

Control; FasterVLM's tables report it as the floor (56.5 % of LLaVA-1.5-7B's full score).
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch

from vispress.budget import Budget
from vispress.errors import BudgetError
from vispress.methods.base import Compressor, Evidence
from vispress.registry import register_method
from vispress.types import Placement, Stage, TokenPlan, VisualTokens


@final
@register_method("no_image")
@dataclass(frozen=True, kw_only=True)
class NoImage(Compressor):
    """Drop all visual tokens before the LLM; takes no budget.

    Raises:
        BudgetError: A budget is given.
    """

    summary: ClassVar[str] = "nothing: the floor that text alone reaches"
    paper: ClassVar[str] = "control"
    evidence: ClassVar[Evidence] = "control"
    takes_budget: ClassVar[bool] = False

    def validate(self) -> None:
        given = {
            "keep_ratio": self.keep_ratio,
            "num_tokens": self.num_tokens,
            "mean_keep_ratio": self.mean_keep_ratio,
        }
        for field, value in given.items():
            if value is not None:
                raise BudgetError(
                    f"no_image keeps no visual token and takes no {field}, got {value!r}"
                )

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.PRE_LLM, budget=Budget(num_tokens=0)),)

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        device = tokens.features.device
        return TokenPlan(keep=torch.empty(tokens.batch, 0, dtype=torch.int64, device=device))
