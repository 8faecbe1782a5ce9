"""CATP: cover each image and its text before the LLM; inside, keep what the query turns to.

Li et al., "CATP: Contextually Adaptive Token Pruning for Efficient and Enhanced Multimodal
In-Context Learning", AAAI 2026, arXiv:2508.07871.
Source: the paper's text, read through a specification; no code is known.
Follows the paper: half of the pruning before the LLM, by greedy maximisation of coverage (each
token's similarity to the closest kept one) plus fit to the image's own text; the other half behind
layer K = 6: tokens of the demonstrations by how much more the last prompt token attends to them
in layer K than in K - 1, plus their cosine to the mean of the query's image and text; a layer
later those of the query's image, by their cosine to the mean of the demonstrations' tokens.
Differs: each image has its own budget, where the paper ranks the tokens of all demonstrations
together; hidden states are those that leave the layers named.
Reconstructed: order and positions; the text of an image is what follows it; a prompt with one image
takes the mean of the text behind it; other budgets keep the two halves equal.
Coverage is of all pairs of an image's tokens, by definition: time grows with N^2 at least.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.budget import Budget, check_ratio, scaled_layer
from vispress.checks import check_integer, check_number
from vispress.errors import BudgetError
from vispress.methods._parts.scoring.cosines import unit
from vispress.methods._parts.scoring.question import mean_cosine
from vispress.methods.base import Compressor, Evidence, check_layer, top_indices, upcast
from vispress.registry import register_method
from vispress.types import Placement, Positions, Queries, Signal, Stage, TokenPlan, VisualTokens
from vispress_kernels.cover_select import cover_select

PUBLISHED_LAYER = 6


def cover(
    x: Float[Tensor, "B N D"], text: Float[Tensor, "B D"], weight: float, num_keep: int
) -> tuple[Int[Tensor, "B K"], Float[Tensor, "B K"]]:
    """Maximise `sum_x max_y sim(x, y) + weight * sum_y sim(y, text)` greedily, one token a step.

    The similarity is `(cos + 1) / 2`. Of equal gains the earlier token is taken; what a step costs
    is said by `cover_select` of the kernels.

    Returns:
        The tokens in the order taken, and the gain of each.
    """
    fit = weight * ((unit(x) * unit(text)[:, None]).sum(dim=2) + 1) / 2
    return cover_select(x, fit, num_keep)


@final
@register_method("catp")
@dataclass(frozen=True, kw_only=True)
class CATP(Compressor):
    """Prune before the LLM and in its early layers, for prompts of demonstrations and a query.

    `keep_ratio` is the mean over decoder layers, of every image: demonstrations, pruned a layer
    earlier, keep a little more. Without a budget `ratio` applies.

    Args:
        ratio: Share of an image's tokens that is left in the end, in `(0, 1]`; half of the others
            go before the LLM.
        layer: The paper's K: demonstrations are pruned behind this decoder layer, the query's image
            behind the next; None for 6 of 32, scaled.
        text_weight: Of the fit to the text against coverage (the paper's lambda 1), at least 0.
        query_weight: Of the cosine to the query against attention (lambda 2), at least 0.
    """

    summary: ClassVar[str] = "covers image and text, then what the query turns to"
    paper: ClassVar[str] = "Li et al., AAAI 2026, arXiv:2508.07871"
    evidence: ClassVar[Evidence] = "paper"
    reads: ClassVar[frozenset[Signal]] = frozenset({Signal.QUERY_ATTENTION, Signal.CONTEXT})
    default_positions: ClassVar[Positions] = "original"

    ratio: float = 0.222
    layer: int | None = None
    text_weight: float = 0.7
    query_weight: float = 0.6

    def validate(self) -> None:
        check_ratio("ratio", self.ratio)
        check_number("text_weight", self.text_weight, low=0.0)
        check_number("query_weight", self.query_weight, low=0.0)
        if self.layer is not None:
            check_integer("layer", self.layer, low=1)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        published = max(1, min(scaled_layer(PUBLISHED_LAYER, num_layers), num_layers - 3))
        layer = published if self.layer is None else self.layer
        check_layer("layer", layer, num_layers - 2)
        first, earlier, last = self.budgets(layer + 1, num_layers)
        demonstrations = Placement(
            stage=Stage.IN_LLM,
            budget=earlier,
            layer=layer + 1,
            queries=Queries.LAST,
            attention_depth=2,
            images="earlier",
        )
        query = Placement(stage=Stage.IN_LLM, budget=last, layer=layer + 2, images="last")
        return (Placement(stage=Stage.PRE_LLM, budget=first), demonstrations, query)

    def budgets(self, layer: int, num_layers: int) -> tuple[Budget, Budget, Budget]:
        """Make budgets of what enters the LLM, of demonstrations from `layer` on, of the query."""
        ratio = earlier = self.ratio
        if (last := self.num_tokens) is not None:
            first = Budget(num_tokens=round(last * (1 + ratio) / 2 / ratio))
            return first, Budget(num_tokens=last), Budget(num_tokens=last)
        mean = self.keep_ratio if self.mean_keep_ratio is None else self.mean_keep_ratio
        if mean is not None:
            half = (layer + 1) / 2
            ratio = min(1.0, (mean * num_layers - half) / (num_layers - half))
            if ratio <= 0.0:
                raise BudgetError(
                    f"a mean of {mean} over {num_layers} layers cannot be reached when half of the "
                    f"tokens stay until layer {layer + 1}; ask for more or give an earlier `layer`"
                )
            spent = (1 + ratio) / 2 * layer
            earlier = min(1.0, (mean * num_layers - spent) / (num_layers - layer))
        first = Budget(keep_ratio=(1 + ratio) / 2, rounding="floor")
        return first, Budget(keep_ratio=earlier), Budget(keep_ratio=ratio)

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        context = tokens.context
        assert context is not None  # declared in `reads`
        if tokens.query_attention is not None:
            assert context.query is not None
            before, now = upcast(tokens.query_attention).mean(dim=(2, 3)).unbind(1)
            near = mean_cosine(tokens.features, context.query[:, None])
            score = (now - before).clamp(min=0) + self.query_weight * near
        elif context.earlier is not None:
            score = mean_cosine(tokens.features, context.earlier[:, None])
        else:
            order, _ = cover(tokens.features, context.paired_text, self.text_weight, num_keep)
            return TokenPlan(keep=order.sort(dim=1).values)
        return TokenPlan(keep=top_indices(score, num_keep))
