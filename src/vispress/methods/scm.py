"""SCM: a probe through two decoder layers finds the detail that what follows attends to.

Huang et al., "Mini-Monkey: Alleviating the Semantic Sawtooth Effect for Lightweight MLLMs via
Complementary Image Pyramid", ICLR 2025, arXiv:2408.02034 (the scale compression mechanism).
Source: the released code (Yuliang-Liu/Monkey 498e1d9, MIT) and its vectors.
Follows the code: embeddings run through decoder layers 0 and 1; the score of a detail token is the
attention of layer 1 that it gets from every token behind the detail, mean over heads and queries;
the best stay in order, and the LLM runs from layer 0 on what is left, with compact positions.
Differs: the first token behind the detail is not lost (the code resumes one place too far); any
batch size; the count is of the whole image, its thumbnail included.
Reconstructed, for models without Mini-Monkey's own cropping: detail is the crops of an AnyRes image
(their thumbnail stands first and is no successor), the whole picture or video elsewhere, and each
tile on InternVL, which is not told what tiles belong together (later ones are successors).
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch

from vispress.budget import Rounding
from vispress.checks import check_integer
from vispress.devices import sent
from vispress.errors import ConfigError
from vispress.methods._parts.geometry.segments import GEOMETRY
from vispress.methods.base import Compressor, Evidence, descending, upcast
from vispress.registry import register_method
from vispress.types import Placement, Queries, Signal, Stage, TokenPlan, VisualTokens


@final
@register_method("scm")
@dataclass(frozen=True, kw_only=True)
class SCM(Compressor):
    """Prune before the LLM, by attention of an early layer that a probe gives.

    A thumbnail is kept before its crops: a budget below its size keeps its best tokens and no
    detail. Newline tokens come next where the budget leaves room for detail, else last.

    Args:
        probe_layers: Decoder layers that run ahead of the LLM, at least 1 and at most all; the
            attention is that of the last one. A count of layers: not scaled by depth.

    Raises:
        ConfigError: It is no positive integer, or the LLM has fewer layers.
    """

    summary: ClassVar[str] = "detail most attended by what follows, in a probe of the first layers"
    paper: ClassVar[str] = "Huang et al., ICLR 2025, arXiv:2408.02034"
    evidence: ClassVar[Evidence] = "code"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY | {Signal.MEAN_ATTENTION}
    rounding: ClassVar[Rounding] = "floor"

    probe_layers: int = 2

    def validate(self) -> None:
        check_integer("probe_layers", self.probe_layers, low=1)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        if self.probe_layers > num_layers:
            raise ConfigError(
                f"probe_layers must be at most the LLM's {num_layers} decoder layers, "
                f"got {self.probe_layers}"
            )
        return (
            Placement(
                stage=Stage.PRE_LLM,
                budget=self.budget(num_layers),
                queries=Queries.AFTER,
                probe=self.probe_layers - 1,
            ),
        )

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        assert tokens.mean_attention is not None  # declared in `reads`
        order = descending(upcast(tokens.mean_attention))
        if tokens.crops is not None:
            segments = tokens.segments()
            newline = segments < 0
            thumbnail = (segments == 0) & tokens.crops.thumbnail
            room = num_keep > (thumbnail | newline).sum(dim=1, keepdim=True)
            tier = 2 * thumbnail + torch.where(room, 1, -1) * newline
            by_tier = sent(tier, order.device).gather(1, order)
            order = order.gather(1, by_tier.argsort(dim=1, descending=True, stable=True))
        return TokenPlan(keep=order[:, :num_keep].sort(dim=1).values)
