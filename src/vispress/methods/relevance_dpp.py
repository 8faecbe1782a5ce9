"""Relevance DPP: keep tokens that a small trained network finds relevant, and that differ.

Own; nothing was published. CDPruner's kernel (see `cdpruner`) with another relevance: the model's
own attention as a ranking keeps duplicates and loses to diversity alone, while as the relevance of
a determinantal point process it beats both where few tokens stay.
A network of two blocks reads projected tokens and the question's input embeddings and gives a score
a token. Where K tokens of an image stay, relevance is `r = exp(w / K (score - best))`: the fewer
stay, the more it counts which they are. Tokens are chosen one by one, crop by crop and frame by
frame, each the one with the largest `r^2` times what is new about it. That is its cosine distance
to the nearest chosen one (DivPrune, weighted); below the share `spread`, what the chosen ones leave
of it by projection (the greedy maximum of the kernel `diag(r) cos(V, V) diag(r)`). Distance did as
well as the determinant where few stay and better where many do, so the determinant is not the
default.
Trained by `vispress train-compressor` for any checkpoint, without labels: the target is the model's
own attention from the question to the picture. Untrained, all tokens are as relevant, and only
diversity counts.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vispress.checks import check_integer, check_number
from vispress.devices import sent
from vispress.errors import ConfigError
from vispress.methods._parts.geometry.segments import GEOMETRY, Part, keep_by_segment
from vispress.methods._parts.networks.layers import Attend, Dense, FeedForward, Norm, places
from vispress.methods._parts.scoring.question import question
from vispress.methods.base import Compressor, Evidence, upcast
from vispress.precision import full_precision
from vispress.registry import register_method
from vispress.types import ModuleShape, Placement, Signal, Stage, TokenPlan, VisualTokens
from vispress_kernels.dpp_select import dpp_select
from vispress_kernels.maxmin_select import maxmin_select

LEAST = 1e-3
"""Relevance of the least relevant: the kernel stays regular."""


class Block(nn.Module):
    """Let visual tokens look at the text, then at each other.

    Args:
        width: Of both.
        heads: Of attention, a divisor of the width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.across, self.among = Attend(width, heads), Attend(width, heads)
        self.alone = FeedForward(width)

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        words: Float[Tensor, "B T D"],
        valid: Bool[Tensor, "B T"] | None,
    ) -> Float[Tensor, "B N D"]:
        """Change visual tokens."""
        x = self.across(x, words, valid)
        changed: Tensor = self.alone(self.among(x, x))
        return changed


class Relevance(nn.Module):
    """Score visual tokens by what a question asks for; all alike at first.

    Args:
        width_in: Of visual tokens and of the text.
        width: Inside; even.
        heads: Of its attention, a divisor of the width.
        blocks: Times that visual tokens look at the text and at each other.
    """

    def __init__(self, width_in: int, *, width: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.visual = nn.Sequential(Norm(width_in), Dense(width_in, width))
        self.text = nn.Sequential(Norm(width_in), Dense(width_in, width))
        self.read = nn.ModuleList([Attend(width, heads), FeedForward(width)])
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.out = nn.Sequential(Norm(width), Dense(width, 1, zero=True))

    def forward(
        self,
        features: Float[Tensor, "B N D"],
        text: Float[Tensor, "B T D"],
        valid: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B N"]:
        """Score tokens, in at least fp32; any range.

        Args:
            features: Projected visual tokens.
            text: Input embeddings of the question; T may be 0.
            valid: False on padding behind a question; each row has a valid token.
        """
        with full_precision():  # training runs it outside of a plan, perhaps under autocast
            x, words = self.visual(features), self.text(text)
            words = words + places(words.shape[1], words.shape[2], words)
            attend, change = self.read
            words = change(attend(words, words, valid))
            for block in self.blocks:
                x = block(x, words, valid)
            score: Tensor = self.out(x)[..., 0]
        return score


@final
@register_method("relevance_dpp")
@dataclass(frozen=True, kw_only=True)
class RelevanceDPP(Compressor):
    """Prune before the LLM, by diversity weighted with a learned relevance.

    Args:
        weight: How much the score counts, divided by the tokens that stay; at least 0.
        spread: Share of an image's tokens from which on distance to the nearest chosen token
            counts, in `[0, 1]`; below, the determinant.
        width: Of the network, even.
        heads: Of its attention, a divisor of the width.
        blocks: Of the network.
    """

    summary: ClassVar[str] = "diverse and relevant by a trained network: weighted max-min, or a DPP"
    paper: ClassVar[str] = "own"
    evidence: ClassVar[Evidence] = "own"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY | {Signal.TEXT_EMBEDDINGS}
    trained: ClassVar[bool] = True
    untrained: ClassVar[str] = "it chooses by diversity alone"

    weight: float = 2.0
    spread: float = 0.0
    width: int = 64
    heads: int = 4
    blocks: int = 2

    def validate(self) -> None:
        check_number("weight", self.weight, low=0.0, high=100.0)
        check_number("spread", self.spread, low=0.0, high=1.0)
        for name in ("width", "heads", "blocks"):
            check_integer(name, getattr(self, name), low=1)
        if self.width % (2 * self.heads):
            raise ConfigError(
                f"width must be a multiple of twice the heads, got width={self.width} and "
                f"heads={self.heads}"
            )

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.PRE_LLM, budget=self.budget(num_layers)),)

    def make_module(self, shape: ModuleShape) -> Relevance:
        return Relevance(shape.width, width=self.width, heads=self.heads, blocks=self.blocks)

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        assert tokens.module is not None  # `trained`
        x = tokens.features
        score: Tensor = tokens.module(x, question(tokens))
        counted = sent(tokens.segments(), x.device) >= 0
        best = torch.where(counted, score, float("-inf")).amax(dim=1, keepdim=True)
        weight = self.weight / max(1, num_keep)
        relevance = upcast(((score - best) * weight).clamp(max=0.0).exp().clamp(min=LEAST))
        few = num_keep < self.spread * tokens.num_original

        def pick(part: Part) -> Tensor:
            own, r = part.of(x), part.of(relevance)
            if few:
                return dpp_select(own, r, part.share, backend=tokens.backend)
            return maxmin_select(own, part.share, weight=r.square(), backend=tokens.backend)

        return TokenPlan(keep=keep_by_segment(tokens, num_keep, pick))
