"""FlashVLM: keep tokens that [CLS] and the text both point at, and the rest without duplicates.

Cai et al., "FlashVLM: Text-Guided Visual Token Selection for Large Multimodal Models", 2025,
arXiv:2512.20561.
Source: the code of CaiKaitong (CaiKaitong/FlashVLM e1a80e8, MIT) and its vectors.
Follows the code: [CLS] attention, and a soft maximum over words of the cosine between projected
tokens and input embeddings, sharpened by a softmax over tokens and a power, damped but for the top
0.5 %; joined by a geometric mean. Half of the tokens by that score, half by VisPruner's removal of
duplicates, where the surviving even-ranked tokens stand, most alike first, before the odd ones in
the next round. All text of the prompt counts; that of earlier turns, in a cache, does not.
Differs: scales are those of one image; `gating=True` weighs words by the length of their
embeddings, as meant (in the code's LLaVA file the weight is always 1). Crops and frames have shares
in proportion (the released AnyRes path does not run); newlines are kept within the budget.
`scores="column_mean"` for encoders without [CLS] follows the code's Qwen port.
Removal of duplicates takes time of N^3 for a share of the tokens, as in VisPruner.
"""

from dataclasses import dataclass
from typing import ClassVar, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from vispress.checks import check_choice, check_flag, check_integer, check_number
from vispress.methods._parts.clustering.duplicate_removal import remove_duplicates
from vispress.methods._parts.geometry.segments import GEOMETRY, Part, keep_by_segment
from vispress.methods._parts.scoring.cosines import unit
from vispress.methods._parts.scoring.encoder_attention import (
    Scores,
    attention_signals,
    encoder_attention,
)
from vispress.methods._parts.scoring.question import quantile, scaled
from vispress.methods.base import Compressor, Evidence, descending, upcast
from vispress.registry import register_method
from vispress.types import Placement, Signal, Stage, TokenPlan, VisualTokens

WORD_TEMPERATURE, TOKEN_TEMPERATURE, POWER = 0.05, 0.01, 2.5
TOP_SHARE, DAMPING, LOWEST = 0.005, 0.1, 1e-6


def word_match(
    x: Float[Tensor, "b n d"], texts: Float[Tensor, "b t d"], *, gating: bool
) -> Float[Tensor, "b n"]:
    """Take the soft maximum over words of each token's cosine to them; 0 without words."""
    words = unit(texts)
    if gating:
        length = upcast(texts).norm(dim=-1, keepdim=True)
        words = words * length / length.amax(dim=1, keepdim=True)
    match = unit(x) @ words.mT
    return ((match / WORD_TEMPERATURE).softmax(dim=2) * match).sum(dim=2)


def sharpened(match: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
    """Sharpen the text match into [1e-6, 1]: all but the top 0.5 % are damped."""
    peaked = scaled((match / TOKEN_TEMPERATURE).softmax(dim=1).pow(POWER))
    top = peaked >= quantile(peaked, 1 - TOP_SHARE)
    return scaled(torch.where(top, peaked, DAMPING * peaked)).clamp(min=LOWEST)


@final
@register_method("flashvlm")
@dataclass(frozen=True, kw_only=True)
class FlashVLM(Compressor):
    """Prune before the LLM, by encoder attention joined with text match, and by duplicates.

    Args:
        eta: Weight of the text against [CLS] in the geometric mean, in `[0, 1]`.
        important_ratio: Share of the kept tokens that the score alone picks, in `[0, 1]`.
        step: Duplicates dropped a round, at least 1.
        gating: Weigh words by the length of their embeddings.
        scores: `"cls"`, or `"column_mean"` (mean attention received) for encoders without [CLS].
    """

    summary: ClassVar[str] = "pointed at by [CLS] and the text, and the rest without duplicates"
    paper: ClassVar[str] = "Cai et al. 2025, arXiv:2512.20561"
    evidence: ClassVar[Evidence] = "code"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY | {
        Signal.CLS_ATTENTION,
        Signal.VISION_FEATURES,
        Signal.TEXT_EMBEDDINGS,
    }

    eta: float = 0.5
    important_ratio: float = 0.5
    step: int = 8
    gating: bool = False
    scores: Scores = "cls"

    def validate(self) -> None:
        check_choice("scores", self.scores, get_args(Scores))
        check_number("eta", self.eta, low=0.0, high=1.0)
        check_number("important_ratio", self.important_ratio, low=0.0, high=1.0)
        check_integer("step", self.step, low=1)
        check_flag("gating", self.gating)

    def signals(self) -> frozenset[Signal]:
        return attention_signals(self.reads, self.scores)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.PRE_LLM, budget=self.budget(num_layers)),)

    def fused(self, a: Tensor, match: Tensor) -> Float[Tensor, "b n"]:
        """Take the geometric mean of attention and text match, both in (0, 1]."""
        intrinsic = scaled(a).clamp(min=LOWEST)
        return ((1 - self.eta) * intrinsic.log() + self.eta * sharpened(match).log()).exp()

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        assert tokens.vision_features is not None  # declared in `reads`, as the text
        assert tokens.text_embeddings is not None
        attention = encoder_attention(tokens, self.scores)
        match = word_match(tokens.features, tokens.text_embeddings, gating=self.gating)
        x = tokens.vision_features

        def pick(part: Part) -> Tensor:
            ranked = descending(self.fused(part.of(attention), part.of(match)))
            important = int(part.share * self.important_ratio)
            rest = ranked[:, important:]
            rest = remove_duplicates(rest, part.of(x), part.share - important, self.step)
            return torch.cat([ranked[:, :important], rest], dim=1)

        return TokenPlan(keep=keep_by_segment(tokens, num_keep, pick))
