"""MMTok: keep tokens that cover the question's words and the picture's tokens, both at once.

Dong et al., "MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs", ICLR 2026,
arXiv:2508.18264.
Source: https://github.com/Ironieser/MMTok at d1522cd (Apache-2.0).
Follows the code: each word is spread over the visual tokens by a softmax of its cosines to them
(projected tokens, LLM embeddings, temperature .02), each visual token by that of cosines of encoder
features (temperature .2, weight `alpha`); greedily, a token gains what it is given beyond the kept
ones. Every sub-image is selected on its own, against the same words; patches that are all padding
are taken last.
Differs: the text is the question's tokens as they stand, where the code drops stop words and
embeds the words one by one (a method sees no strings); where less than the budget is beside padding
the code repeats a token. Newlines are kept within the budget (the code drops them).
Each of K picks looks at all pairs of tokens, by definition: time grows with K N^2.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.checks import check_number
from vispress.methods._parts.geometry.segments import GEOMETRY, Part, keep_by_segment
from vispress.methods._parts.scoring.cosines import unit
from vispress.methods._parts.scoring.coverage import greedy_cover
from vispress.methods._parts.scoring.question import question
from vispress.methods.base import Compressor, Evidence
from vispress.registry import register_method
from vispress.types import Placement, Signal, Stage, TokenPlan, VisualTokens

ROWS = 1024
"""Rows of cosines that are summed up at a time."""


@dataclass(frozen=True)
class Spread:
    """Rows that are each spread over the visual tokens: `weight * softmax(row . tokens / t)`.

    Args:
        rows: Of length 1.
        tokens: Of length 1; those the softmax is over.
        temperature: t.
        weight: What a row adds up to.
    """

    rows: Float[Tensor, "b R D"]
    tokens: Float[Tensor, "b N D"]
    temperature: float
    weight: float

    def totals(self) -> Float[Tensor, "b R"]:
        """Sum up each row's exponentials, as their logarithm."""
        parts = torch.split(self.rows, ROWS, dim=1)
        sums = [(p @ self.tokens.mT / self.temperature).logsumexp(2) for p in parts]
        return torch.cat(sums, dim=1)

    def given(
        self, own: slice, some: Tensor | None, totals: Float[Tensor, "b R"]
    ) -> Float[Tensor, "c s R"]:
        """What the rows give to some tokens, or to all of them."""
        tokens = self.tokens[own] if some is None else self.tokens[own, some]
        logits = tokens @ self.rows[own].mT / self.temperature
        return logits.sub_(totals[own, None]).exp_().mul_(self.weight)


def cover(
    spreads: tuple[Spread, Spread], last: Float[Tensor, "b N"], num_keep: int
) -> Int[Tensor, "b K"]:
    """Choose tokens, in the order taken, by what rows give them and not to those before.

    Args:
        spreads: Of the words and of the visual tokens.
        last: 1 for tokens that are taken behind all others, else 0.
        num_keep: K.
    """
    totals = [spread.totals() for spread in spreads]

    def reach(own: slice, some: Tensor | None) -> Tensor:
        given = [s.given(own, some, t) for s, t in zip(spreads, totals, strict=True)]
        return torch.cat(given, dim=2)

    tokens = torch.cat([spread.tokens for spread in spreads], dim=2)
    # no token gains more than all rows have
    most = 1 + sum(spread.weight * spread.rows.shape[1] for spread in spreads)
    last = last.to(tokens.dtype)
    return greedy_cover(reach, tokens, torch.ones_like(last), last * -most, num_keep)


@final
@register_method("mmtok")
@dataclass(frozen=True, kw_only=True)
class MMTok(Compressor):
    """Prune before the LLM, by coverage of the question and of the picture.

    Args:
        alpha: Weight of the picture's tokens against the words, at least 0.
        text_temperature: Of the softmax of a word, above 0.
        image_temperature: Of the softmax of a visual token, above 0.
    """

    summary: ClassVar[str] = "covers the question's words and the picture's tokens"
    paper: ClassVar[str] = "Dong et al., ICLR 2026, arXiv:2508.18264"
    evidence: ClassVar[Evidence] = "code"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY | {
        Signal.VISION_FEATURES,
        Signal.TEXT_EMBEDDINGS,
        Signal.PADDING,
    }

    alpha: float = 0.5
    text_temperature: float = 0.02
    image_temperature: float = 0.2

    def validate(self) -> None:
        check_number("alpha", self.alpha, low=0.0)
        check_number("text_temperature", self.text_temperature, low=1e-3)
        check_number("image_temperature", self.image_temperature, low=1e-3)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.PRE_LLM, budget=self.budget(num_layers)),)

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        assert tokens.vision_features is not None  # declared in `reads`
        seen, projected = unit(tokens.vision_features), unit(tokens.features)
        words = unit(question(tokens))
        last = torch.zeros_like(seen[..., 0])
        if tokens.padding is not None:
            last = (tokens.padding >= 1).to(seen)

        def pick(part: Part) -> Tensor:
            x = part.of(seen)
            own = words[part.rows]
            own = own.repeat_interleave(len(x) // len(own), dim=0)
            text = Spread(own, part.of(projected), self.text_temperature, 1 / max(1, own.shape[1]))
            image = Spread(x, x, self.image_temperature, self.alpha / x.shape[1])
            return cover((text, image), part.of(last), part.share)

        return TokenPlan(keep=keep_by_segment(tokens, num_keep, pick))
