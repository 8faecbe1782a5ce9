"""VTC-CLS: keep the tokens with the most [CLS] attention, summed over many encoder layers.

Wang et al., "[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs", 2024,
arXiv:2412.05819.
Source: https://github.com/THU-MIG/VTC-CLS at e41ac9b (Apache-2.0).
Follows the code: layers from `start_layer` up to the layer that gives the features (the
penultimate one; the last layer never counts), mean over heads, sum over layers.
Differs: any number of tokens and images, where the code knows one image of 576. AnyRes is scored
crop by crop as in FasterVLM, and `scores="column_mean"` serves encoders without [CLS]; both are
reconstructions.
"""

from dataclasses import dataclass
from typing import ClassVar, final, get_args

from jaxtyping import Float
from torch import Tensor

from vispress.checks import check_choice, check_integer
from vispress.errors import ConfigError
from vispress.methods._parts.geometry.segments import GEOMETRY
from vispress.methods._parts.scoring.encoder_attention import (
    Scores,
    attention_signals,
    encoder_attention,
)
from vispress.methods.base import Evidence, ScorePruner
from vispress.registry import register_method
from vispress.types import Placement, Signal, Stage, VisualTokens

PUBLISHED_START = 16
PUBLISHED_ENCODER_DEPTH = 24
"""Layers of CLIP ViT-L/14, to which the published start belongs."""


@final
@register_method("vtc_cls")
@dataclass(frozen=True, kw_only=True)
class VTCCLS(ScorePruner):
    """Prune before the LLM, by an ensemble of encoder layers; the question plays no part.

    Args:
        start_layer: First encoder layer of the sum, up to the feature layer; negative counts from
            the end of the encoder. None for the published 16 of 24, scaled by depth.
        scores: `"cls"`, or `"column_mean"` (mean attention received) for encoders without [CLS].

    Raises:
        ConfigError: `start_layer` is no integer, or `scores` is another word.
    """

    summary: ClassVar[str] = "most attended by [CLS], summed over encoder layers"
    paper: ClassVar[str] = "Wang et al. 2024, arXiv:2412.05819"
    evidence: ClassVar[Evidence] = "code"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY | {Signal.CLS_ATTENTION}
    per_segment: ClassVar[bool] = True

    start_layer: int | None = None
    scores: Scores = "cls"

    def validate(self) -> None:
        check_choice("scores", self.scores, get_args(Scores))
        if self.start_layer is not None:
            check_integer("start_layer", self.start_layer)

    def signals(self) -> frozenset[Signal]:
        return attention_signals(self.reads, self.scores)

    def encoder_layers(self, num_layers: int, feature_layer: int) -> tuple[int, ...]:
        """Read from the start to the feature layer.

        Raises:
            ConfigError: The start lies behind the feature layer or before the encoder.
        """
        if self.start_layer is None:
            start = min(feature_layer, PUBLISHED_START * num_layers // PUBLISHED_ENCODER_DEPTH)
        else:
            start = self.start_layer + num_layers * (self.start_layer < 0)
        if not 0 <= start <= feature_layer:
            raise ConfigError(
                f"start_layer must be in [0, {feature_layer}], the encoder's feature layer, "
                f"or count from its {num_layers} layers' end, got {self.start_layer!r}"
            )
        return tuple(range(start, feature_layer + 1))

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.PRE_LLM, budget=self.budget(num_layers)),)

    def score(self, tokens: VisualTokens) -> Float[Tensor, "B N"]:
        """Average over heads and sum over encoder layers."""
        attention = encoder_attention(tokens, self.scores)
        # a single layer comes without an axis of its own
        return attention if attention.ndim == 2 else attention.sum(dim=1)
