"""No image: drop every visual token, to see what the language model answers without looking.

Control; FasterVLM's tables report it as the floor (56.5 % of LLaVA-1.5-7B's full score).
"""

from dataclasses import dataclass
from typing import ClassVar, final

from vispress.budget import Budget
from vispress.methods.base import Compressor, Evidence, keep_none
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

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.PRE_LLM, budget=Budget(num_tokens=0)),)

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        return keep_none(tokens)
