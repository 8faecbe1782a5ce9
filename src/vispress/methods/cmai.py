"""CMAI: mask the pairs of a word and an image token that the word's focus leaves out.

Yang et al. 2024, arXiv:2411.15453 (the half of "VMTC + CMAI" inside the LLM; the other is `vmtc`).
Source: descriptions of the paper, read through a specification; no code or numbers were found.
Follows the paper: the focus `F = A_tt A_ti` joins text-to-text and text-to-image attention, and
pairs of low focus are masked before the softmax. Nothing is dropped, all keys and values stay.
Reconstructed (all of the rest): A is the layer's own attention before the mask, mean over heads;
rows and columns of A_tt are a sample's text, columns of A_ti all its visual tokens that are left.
The diagonal of A_tt stays as it is: a word's own attention to an image token counts as much as the
word attends to itself. A row keeps the smallest set with 0.9 of its focus, in decoder layers 8 and
later of 32 (scaled by depth), and everything where it has no focus (text before any image).
Differs: nothing is known to differ, as nothing more is known.
It saves no time: a dense mask is needed, which FlashAttention has no place for (SDPA, eager have).
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Bool
from torch import Tensor

from vispress.budget import Budget, scaled_layer
from vispress.checks import check_integer, check_number
from vispress.methods.base import Compressor, Evidence, check_layer
from vispress.methods.pair_masker import PairMasker
from vispress.registry import register_method
from vispress.types import Placement, Positions, Stage, TokenPlan, VisualTokens


@final
@register_method("cmai")
@dataclass(frozen=True, kw_only=True)
class CMAI(PairMasker, Compressor):
    """Let each text row attend to the image tokens of its focus alone; takes no budget.

    Args:
        layer: First decoder layer that masks, in `[1, num_layers)`; None for the reconstructed 8 of
            32, scaled by depth.
        mass: Share of a row's focus that the kept pairs hold at least, in `(0, 1]`; 1.0 masks
            nothing.

    Raises:
        BudgetError: A budget is given.
        ConfigError: A value is out of range.
    """

    summary: ClassVar[str] = "all tokens; of pairs with a word, those in its focus"
    paper: ClassVar[str] = "Yang et al. 2024, arXiv:2411.15453"
    evidence: ClassVar[Evidence] = "reconstructed"
    takes_budget: ClassVar[bool] = False
    default_positions: ClassVar[Positions] = "original"

    layer: int | None = None
    mass: float = 0.9

    def validate(self) -> None:
        if self.layer is not None:
            check_integer("layer", self.layer, low=1)
        check_number("mass", self.mass, low=1e-6, high=1.0)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        layer = scaled_layer(8, num_layers) if self.layer is None else self.layer
        check_layer("layer", layer, num_layers)
        return (Placement(stage=Stage.MASK, budget=Budget(keep_ratio=1.0), layer=layer),)

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        every = torch.arange(tokens.num_visual, device=tokens.features.device)
        return TokenPlan(keep=every.expand(tokens.batch, -1).contiguous())

    def pair_masker(self) -> PairMasker | None:
        return None if self.mass == 1.0 else self

    def keep_pairs(self, text: Tensor, image: Tensor) -> Bool[Tensor, "B R N"]:
        focus = text @ image
        ranked, order = focus.sort(dim=2, descending=True, stable=True)
        total = focus.sum(dim=2, keepdim=True)
        # of what stands before it, so that the one that reaches the mass is in
        before = ranked.cumsum(dim=2) - ranked
        keep = before < self.mass * total
        return keep.scatter(2, order, keep) | (total <= 0)
