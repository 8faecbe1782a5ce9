"""SD-RPN: a head on a middle layer predicts the region that the answer needs; the rest goes.

ICLR 2026, arXiv:2509.16944.
Source: the official code (YuHengsss/SD-RPN, no licence file: not copied), read through a
specification.
Follows the code: logits are q . k / sqrt(d) without rotation, a mean over heads, of the last prompt
token's query and the visual tokens' keys behind a norm, at layer 15 of 32; trained, the model
frozen, by binary cross-entropy on cells that the model's own attention from its answer marks as
foreground or background. Their sigmoid is smoothed by a Gaussian of 3 x 3 cells; above 0.15 a cell
belongs to the region.
Reconstructed: as a compressor. The authors crop the region, encode it anew and append its tokens,
which needs room that a prompt does not have; here visual tokens outside of it are dropped before
the layer, but for some at equal steps. The head is its own last part: queries and keys, on the
model's hidden states (the authors run two trained copies of decoder layers before it, a tenth of a
prefill).
Differs: cells that are gone, and other sub-images, count for nothing in the smoothing. Where no
text follows an image, all cells score alike.
Untrained its choice means nothing (`vispress train-compressor --method sd_rpn`). The authors' heads
hold copied layers and do not fit this one.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vispress.budget import Budget, scaled_layer
from vispress.checks import check_integer, check_number
from vispress.devices import sent
from vispress.errors import ConfigError
from vispress.methods._parts.geometry.coordinates import Geometry, coordinates, geometry_of
from vispress.methods._parts.networks.layers import Dense
from vispress.methods.base import (
    Compressor,
    Evidence,
    check_layer,
    remembered,
    top_indices,
    upcast,
)
from vispress.precision import full_precision
from vispress.registry import register_method
from vispress.types import (
    ModuleShape,
    Placement,
    Positions,
    Signal,
    Stage,
    TokenPlan,
    VisualTokens,
)

PUBLISHED_LAYER = 15
_REACH = (-1, 0, 1)


class RegionHead(nn.Module):
    """Score visual tokens by a query of the last prompt token.

    Args:
        width: Of hidden states, and of queries and keys.
        heads: Of both.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.scale = 1 / (heads * (width / heads) ** 0.5)
        self.query, self.key = Dense(width, width), Dense(width, width)

    def forward(
        self, features: Float[Tensor, "B N D"], asking: Float[Tensor, "B D"]
    ) -> Float[Tensor, "B N"]:
        """Give logits of belonging to the region, in at least fp32.

        Args:
            features: Normalised hidden states of visual tokens.
            asking: That of the last prompt token.
        """
        with full_precision():  # training runs it outside of a plan, perhaps under autocast
            query, key = self.query(asking), self.key(features)
            logits: Tensor = (key * query[:, None]).sum(dim=-1) * self.scale
        return logits


@final
@register_method("sd_rpn")
@dataclass(frozen=True, kw_only=True)
class SDRPN(Compressor):
    """Prune once inside the LLM, to the region that a trained head proposes.

    With a threshold in place of a budget the image decides: cells above it stay, one at least.

    Args:
        layer: Decoder layer before which tokens are dropped, in `[1, num_layers)`; None for 15 of
            32, scaled by depth.
        threshold: Of the smoothed sigmoid, in `(0, 1)` (the authors' 0.15), in place of a budget.
        context: Share of what is kept that lies at equal steps, whatever its score, in `[0, 1]`.

    Raises:
        ConfigError: A value is out of range, or there are a threshold and a budget.
    """

    summary: ClassVar[str] = "the region that a trained head proposes, by the last prompt token"
    paper: ClassVar[str] = "ICLR 2026, arXiv:2509.16944"
    evidence: ClassVar[Evidence] = "reconstructed"
    reads: ClassVar[frozenset[Signal]] = frozenset(
        {Signal.TEXT_STATES, Signal.INPUT_NORM, Signal.GRID, Signal.CROPS}
    )
    trained: ClassVar[bool] = True
    default_positions: ClassVar[Positions] = "original"

    layer: int | None = None
    threshold: float | None = None
    context: float = 0.1

    def validate(self) -> None:
        if self.layer is not None:
            check_integer("layer", self.layer, low=1)
        check_number("context", self.context, low=0.0, high=1.0)
        if self.threshold is None:
            return
        check_number("threshold", self.threshold, low=1e-6, high=1 - 1e-6)
        if not self.unbudgeted:
            raise ConfigError(
                f"threshold={self.threshold} decides how many stay; leave out a budget"
            )

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        layer = scaled_layer(PUBLISHED_LAYER, num_layers) if self.layer is None else self.layer
        check_layer("layer", layer, num_layers)
        if self.threshold is None:
            budget = self.budget(num_layers, layer)
            return (Placement(stage=Stage.IN_LLM, budget=budget, layer=layer),)
        budget = Budget(keep_ratio=1.0)
        return (Placement(stage=Stage.IN_LLM, budget=budget, layer=layer, adaptive=True),)

    def make_module(self, shape: ModuleShape) -> RegionHead:
        return RegionHead(shape.width, shape.num_heads)

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        score = smoothed(tokens, self.logits(tokens).sigmoid())
        if self.threshold is not None:
            best = top_indices(score, 1)
            stay = (score > self.threshold).scatter(1, best, True)
            return TokenPlan(keep=tuple(row.nonzero()[:, 0] for row in stay))
        spaced = round(self.context * num_keep)
        if spaced:
            steps = (torch.arange(spaced) + 0.5) * tokens.num_visual / spaced
            score[:, sent(steps.long(), score.device)] = float("inf")
        return TokenPlan(keep=top_indices(score, num_keep))

    def logits(self, tokens: VisualTokens) -> Float[Tensor, "B N"]:
        """Ask the head, with what the layer's own attention is given."""
        assert tokens.module is not None  # `trained`
        assert tokens.text_states is not None  # declared in `reads`
        assert tokens.input_norm is not None
        if not tokens.text_states.shape[1]:
            return upcast(tokens.features[..., 0]) * 0
        asking = tokens.input_norm(upcast(tokens.text_states[:, -1]))
        logits: Tensor = tokens.module(tokens.input_norm(upcast(tokens.features)), asking)
        return logits


def smoothed(tokens: VisualTokens, score: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
    """Average each cell with its neighbours that are there, by a Gaussian of deviation 1."""
    beside = sent(_neighbours(geometry_of(tokens)), score.device)
    offsets = torch.tensor([i * i + j * j for i in _REACH for j in _REACH])
    weight = sent((-offsets / 2).exp(), score.device).to(score)
    room = score.new_zeros(tokens.batch, tokens.num_original + 1)
    values = room.scatter(1, tokens.index, score)[:, beside] @ weight
    there = room.scatter(1, tokens.index, torch.ones_like(score))[:, beside] @ weight
    own = tokens.index
    return values.gather(1, own) / there.gather(1, own)


@remembered
def _neighbours(geometry: Geometry) -> Int[Tensor, "N0 9"]:
    """Find the cells around each one, itself among them; N0 where there is none."""
    segment, row, col = coordinates(geometry)
    cells = list(zip(segment.tolist(), row.tolist(), col.tolist(), strict=True))
    known = {cell: place for place, cell in enumerate(cells) if cell[0] >= 0}
    found = [
        [
            place if not i and not j else known.get((s, r + i, c + j), len(cells))
            for i in _REACH
            for j in _REACH
        ]
        for place, (s, r, c) in enumerate(cells)
    ]
    return torch.tensor(found)
