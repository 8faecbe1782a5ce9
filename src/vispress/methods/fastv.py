"""FastV: drop the visual tokens that the last prompt token attends to least.

Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024, arXiv:2403.06764.
Source: https://github.com/pkunlp-icler/FastV at d165972 (no licence file: read, not copied).
Follows the code, which ranks by the last prompt token's attention in the layer before, not the
paper's text, which averages over all tokens (their issue 14). Tokens are really removed, once, at
prefill (the variant of their Hugging Face fork), and keep their position ids.
Differs: the row is recomputed from q and k instead of running a layer twice; several images each
have their own budget, where the code ranks them together.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from jaxtyping import Float
from torch import Tensor

from vispress.budget import scaled_layer
from vispress.checks import check_integer
from vispress.methods.base import Evidence, ScorePruner, check_layer, upcast
from vispress.registry import register_method
from vispress.types import Placement, Positions, Queries, Signal, Stage, VisualTokens

PUBLISHED_LAYER = 2


@final
@register_method("fastv")
@dataclass(frozen=True, kw_only=True)
class FastV(ScorePruner):
    """Prune once inside the LLM, by the attention of the layer before.

    Args:
        layer: Decoder layer before which tokens are dropped (the paper's K), in `[1, num_layers)`;
            None for the published 2 of 32, scaled by depth.

    Raises:
        ConfigError: The layer is no positive integer.
    """

    summary: ClassVar[str] = "most attended by the last prompt token, early in the LLM"
    paper: ClassVar[str] = "Chen et al., ECCV 2024, arXiv:2403.06764"
    evidence: ClassVar[Evidence] = "code"
    reads: ClassVar[frozenset[Signal]] = frozenset({Signal.QUERY_ATTENTION})
    default_positions: ClassVar[Positions] = "original"

    layer: int | None = None

    def validate(self) -> None:
        if self.layer is not None:
            check_integer("layer", self.layer, low=1)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        layer = scaled_layer(PUBLISHED_LAYER, num_layers) if self.layer is None else self.layer
        check_layer("layer", layer, num_layers)
        budget = self.budget(num_layers, layer)
        return (Placement(stage=Stage.IN_LLM, budget=budget, layer=layer, queries=Queries.LAST),)

    def score(self, tokens: VisualTokens) -> Float[Tensor, "B N"]:
        """Average the last query's attention over heads."""
        assert tokens.query_attention is not None  # declared in `reads`
        return upcast(tokens.query_attention).mean(dim=(1, 2))
