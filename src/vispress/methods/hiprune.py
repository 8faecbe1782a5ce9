"""HiPrune: most attended tokens of a middle encoder layer with their neighbours, then of the last.

Liu et al., "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in
Vision-Language Models", 2025, arXiv:2508.00553.
Source: https://github.com/Danielement321/HiPrune at 6e83a12 (MIT).
Follows the code: a token's score in an encoder layer is the mean attention that it receives from
all rows, [CLS] included. Anchors, `alpha / 5` of what a sub-image keeps, are the highest of the
object layer (8 of 24 or 15 of 32, from 0); with them stay the tokens one place and one row before
and behind, by number: the neighbour on the left of a row's first token ends the row above, and what
lies outside is the first or the last token. The highest of the feature layer fill up.
Differs: the code's Qwen port can choose a neighbour twice, so that fewer stay, and fails where
anchors and neighbours are more than it keeps; here the count is exact, and neighbours of the
weakest anchors give way. In an encoder of windows a layer that does not attend globally cannot be
the object layer; then the feature layer is both. Crops that were unpadded have shares in
proportion, newlines are kept within the budget (the code drops them); of frames each has its share,
a reconstruction.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.checks import check_integer, check_number
from vispress.devices import sent
from vispress.methods._parts.geometry.coordinates import Geometry, coordinates, geometry_of
from vispress.methods._parts.geometry.segments import GEOMETRY, Part, keep_by_segment
from vispress.methods._parts.scoring.encoder_attention import encoder_attention
from vispress.methods.base import Compressor, Evidence, descending, remembered
from vispress.registry import register_method
from vispress.types import Placement, Signal, Stage, TokenPlan, VisualTokens

PUBLISHED_OBJECT = {24: 8, 32: 15}
"""By depth of the encoder: CLIP's, and Qwen2.5-VL's, where the layer attends globally."""
FAMILY = 5
"""An anchor and its four neighbours."""


@remembered
def rasters(geometry: Geometry) -> Int[Tensor, "3 N0"]:
    """Number each token in the raster of its sub-image, whose width and last number follow."""
    segment, row, col = coordinates(geometry)
    found = torch.zeros(3, len(segment), dtype=torch.int64)
    found[1] = 1
    for each in torch.unique(segment[segment >= 0]).tolist():
        own = segment == each
        r, c = (x[own] - x[own].min() for x in (row, col))
        width = int(c.max()) + 1
        found[0, own], found[1, own] = r * width + c, width
        found[2, own] = (int(r.max()) + 1) * width - 1
    return found


def select(
    middle: Float[Tensor, "b n"],
    deep: Float[Tensor, "b n"],
    raster: Int[Tensor, "b 3 n"],
    size: int,
    anchors: int,
    num_keep: int,
) -> Int[Tensor, "b K"]:
    """Take anchors, their neighbours, those of strong ones first, and the highest of the last.

    Args:
        middle: Attention received in the object layer.
        deep: The same in the feature layer.
        raster: Of each token, as `rasters` numbers them; tokens may be missing.
        size: Numbers there are.
        anchors: How many, at most `num_keep`.
        num_keep: K.
    """
    order = descending(deep)
    if not anchors:
        return order[:, :num_keep]
    number, width, last = raster.unbind(1)
    chosen = descending(middle)[:, :anchors]
    centre, step, end = (x.gather(1, chosen)[..., None] for x in (number, width, last))
    near = torch.cat([centre - 1, centre + 1, centre - step, centre + step], dim=2)
    near = torch.minimum(near.clamp_(min=0), end)
    # the turn of each number: anchors at once, neighbours in the order of their anchors
    turn = torch.arange(anchors, device=near.device).repeat_interleave(4).expand(len(near), -1)
    turns = torch.full((len(near), size), anchors, device=near.device)
    turns = turns.scatter_reduce_(1, near.flatten(1), turn, "amin")
    turns.scatter_(1, centre[..., 0], -1)
    own = turns.gather(1, number.gather(1, order))
    return order.gather(1, own.argsort(dim=1, stable=True)[:, :num_keep])


@final
@register_method("hiprune")
@dataclass(frozen=True, kw_only=True)
class HiPrune(Compressor):
    """Prune before the LLM by two encoder layers; works without [CLS], the question plays no part.

    Args:
        alpha: Share of the kept tokens that are anchors and neighbours, in `[0, 1]`.
        object_layer: Encoder layer of the anchors; None for the published one of 24 and of 32
            layers, or a third of others.
    """

    summary: ClassVar[str] = "most attended in a middle encoder layer, with neighbours, and last"
    paper: ClassVar[str] = "Liu et al. 2025, arXiv:2508.00553"
    evidence: ClassVar[Evidence] = "code"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY | {Signal.COLUMN_ATTENTION}

    alpha: float = 0.1
    object_layer: int | None = None

    def validate(self) -> None:
        check_number("alpha", self.alpha, low=0.0, high=1.0)
        if self.object_layer is not None:
            check_integer("object_layer", self.object_layer, low=0)

    def encoder_layers(self, num_layers: int, feature_layer: int) -> tuple[int, ...]:
        published = PUBLISHED_OBJECT.get(num_layers, num_layers // 3)
        layer = published if self.object_layer is None else self.object_layer
        return tuple(sorted({min(layer, feature_layer), feature_layer}))

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.PRE_LLM, budget=self.budget(num_layers)),)

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        attention = encoder_attention(tokens, "column_mean")
        middle, deep = (attention,) * 2 if attention.ndim == 2 else attention.unbind(1)
        table = rasters(geometry_of(tokens))
        size = int(table[2].max()) + 1  # on the host
        raster = sent(table, tokens.index.device)[:, tokens.index].permute(1, 2, 0)

        def pick(part: Part) -> Tensor:
            anchors = round(part.share * self.alpha / FAMILY)
            scores, own = (part.of(middle), part.of(deep)), part.of(raster).mT
            return select(*scores, own, size, anchors, part.share)

        return TokenPlan(keep=keep_by_segment(tokens, num_keep, pick))
