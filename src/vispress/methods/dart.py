"""DART: keep pivots, and for each of them the tokens least like it.

Wen et al., "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters
More", EMNLP 2025, arXiv:2502.11494.
Source: https://github.com/ModelTC/LightCompress at 9701d03 (Apache-2.0), a third-party port; the
authors' repository was not at hand.
Follows the port: pivots are the image's and the text's tokens with the largest L1 norm of the keys
of the layer before; one after another, each takes the unused tokens of the image with the lowest
cosine to it, on hidden states under the model's final norm.
Differs: pivots take turns by descending norm, the image's first (the port: in a set's order); a
budget is met exactly, earlier pivots take one more (the port truncates: 188, 124 and 60 of 192, 128
and 64); words are those behind the image, as many as there are.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.budget import scaled_layer
from vispress.checks import check_integer
from vispress.methods._parts.scoring.cosines import unit
from vispress.methods.base import Compressor, Evidence, check_layer, descending
from vispress.registry import register_method
from vispress.types import (
    Placement,
    Positions,
    Queries,
    Signal,
    Stage,
    TokenPlan,
    VisualTokens,
)
from vispress_kernels.gather_tokens import gather_tokens

PUBLISHED_LAYER = 2


def pull(
    x: Float[Tensor, "B N D"],
    pivots: Float[Tensor, "B P D"],
    taken: Int[Tensor, "B K"],
    counts: list[int],
) -> Int[Tensor, "B K2"]:
    """Take `counts[i]` more tokens for pivot i: the least similar unused ones.

    Args:
        x: Unit tokens.
        pivots: Unit pivots in their order.
        taken: Tokens that are used already.
        counts: How many each pivot takes.
    """
    asking = [i for i, count in enumerate(counts) if count]
    if not asking:
        return taken
    cosine = torch.stack([(x * pivots[:, i : i + 1]).sum(dim=2) for i in asking], dim=1)
    like, parts = cosine.nan_to_num(nan=3.0), [taken]  # NaN: the last resort, before a second time
    for number, i in enumerate(asking):
        like.scatter_(2, parts[-1][:, None].expand(-1, len(asking), -1), float("inf"))
        parts.append(like[:, number].argsort(dim=1, stable=True)[:, : counts[i]])
    return torch.cat(parts, dim=1)


@final
@register_method("dart")
@dataclass(frozen=True, kw_only=True)
class DART(Compressor):
    """Prune once inside the LLM, by duplication: kept tokens differ from the pivots.

    Args:
        layer: Decoder layer before which tokens are dropped, in `[1, num_layers)`; None for the
            published 2 of 32, scaled by depth.
        image_pivots: Tokens of the image that are kept as pivots, at least 1.
        text_pivots: Words that are pivots, at least 0.
    """

    summary: ClassVar[str] = "pivots with large keys, and what is least like them"
    paper: ClassVar[str] = "Wen et al., EMNLP 2025, arXiv:2502.11494"
    evidence: ClassVar[Evidence] = "reimplementation"
    reads: ClassVar[frozenset[Signal]] = frozenset(
        {Signal.KEY_NORMS, Signal.TEXT_STATES, Signal.FINAL_NORM}
    )
    default_positions: ClassVar[Positions] = "original"

    layer: int | None = None
    image_pivots: int = 4
    text_pivots: int = 4

    def validate(self) -> None:
        if self.layer is not None:
            check_integer("layer", self.layer, low=1)
        check_integer("image_pivots", self.image_pivots, low=1)
        check_integer("text_pivots", self.text_pivots, low=0)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        layer = scaled_layer(PUBLISHED_LAYER, num_layers) if self.layer is None else self.layer
        check_layer("layer", layer, num_layers)
        budget, words = self.budget(num_layers, layer), Queries.TEXT_AFTER
        return (Placement(stage=Stage.IN_LLM, budget=budget, layer=layer, queries=words),)

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        assert tokens.key_norms is not None  # declared in `reads`, as the others
        assert tokens.text_states is not None
        assert tokens.final_norm is not None
        norms, backend = tokens.key_norms, tokens.backend
        own = descending(norms[:, : tokens.num_visual])[:, : min(self.image_pivots, num_keep)]
        words = descending(norms[:, tokens.num_visual :])[:, : self.text_pivots]
        x = unit(tokens.final_norm(tokens.features))
        text = tokens.final_norm(gather_tokens(tokens.text_states, words, backend=backend))
        pivots = [gather_tokens(x, own, backend=backend), unit(text)]
        number, left = own.shape[1] + words.shape[1], num_keep - own.shape[1]
        counts = [left // number + (i < left % number) for i in range(number)]
        keep = pull(x, torch.cat(pivots, dim=1), own, counts)
        return TokenPlan(keep=keep.sort(dim=1).values)
