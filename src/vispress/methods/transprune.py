"""TransPrune: keep tokens that the layers change most, and that the text attends to most.

Li et al., "TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model", CVPR
2026, arXiv:2507.20630.
Source: https://github.com/liaolea/TransPrune at c9e8284 (MIT).
Follows the code: token transition variation (TTV) with a signed cosine (`direction="abs"` is the
paper's text), its softmax over the whole sequence, summed over layers; attention of the *next*
layer from all text behind the image; counts are truncated shares of the original count.
Differs: padding and other samples stay out of the softmax (the code is for batch 1); the score is
half the code's (`alpha=0.5` against 1 + 1: same ranking); where no text follows the image, TTV
alone decides (ours).
Reconstructed: `preset="low"` (unreleased ratios; these meet its published FLOPs), and schedules
for other budgets (`_parts.schedules.stage_budgets`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from vispress.budget import Rounding
from vispress.checks import check_ascending, check_choice, check_number
from vispress.errors import ConfigError
from vispress.methods._parts.schedules.stage_budgets import (
    check_schedule,
    stage_budgets,
    stage_layers,
)
from vispress.methods.base import Evidence, ScorePruner, upcast
from vispress.registry import register_method
from vispress.types import Placement, Queries, Signal, Stage, Transition, VisualTokens

PUBLISHED_LAYERS = (7, 9, 12)
PRESETS = {"high": (0.875, 0.625, 0.125), "low": (0.625, 0.1875, 0.0625)}


Direction = Literal["signed", "abs"]


def summed_variation(steps: Sequence[Transition], direction: Direction) -> Float[Tensor, "B N"]:
    """Sum the TTV of layers: `|y| / |x|` times the sequence softmax of `1 - cos`.

    Args:
        steps: Layers; the runtime gives those that ran on the same rows one tensor of validity.
        direction: `"signed"` or `"abs"` cosine.
    """
    same: dict[int, list[Transition]] = {}
    for step in steps:
        same.setdefault(id(step.sequence_valid), []).append(step)
    groups = list(same.values())
    ordered = [step for group in groups for step in group]
    own = _reading(_joined([step.cosine for step in ordered]), direction)
    scale = _joined([log_sum(group, direction) for group in groups])
    share = (1 - own - scale).exp() * _joined([step.magnitude for step in ordered])
    parts = torch.split(share, [2 * len(group) for group in groups], dim=1)
    sums = [part.sum(dim=1) for part in parts]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(dim=0)


def log_sum(steps: Sequence[Transition], direction: Direction) -> Float[Tensor, "B M 1"]:
    """Compute the softmax's normaliser of each module of layers that ran on the same rows."""
    whole = _reading(_joined([step.sequence_cosine for step in steps]), direction)
    valid = steps[0].sequence_valid[:, None]
    return torch.where(valid, 1 - whole, float("-inf")).logsumexp(dim=-1, keepdim=True)


def _reading(cosine: Tensor, direction: Direction) -> Tensor:
    """Read the cosine as the direction asks for."""
    return cosine.abs() if direction == "abs" else cosine


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Join modules of all parts along the second axis, in at least fp32."""
    wide = [upcast(part) for part in parts]
    return wide[0] if len(wide) == 1 else torch.cat(wide, dim=1)


@final
@register_method("transprune")
@dataclass(frozen=True, kw_only=True)
class TransPrune(ScorePruner):
    """Prune at several depths, by how much layers turn and stretch a token, and text attention.

    Without a budget the preset applies; `_parts.schedules.stage_budgets` says what others mean.

    Args:
        preset: `"high"` (published) or `"low"` (reconstructed).
        layers: Decoder layers before which to drop; None for the published 7, 9, 12 of 32, scaled.
        ratios: Kept share of the original tokens at each layer, in place of the preset's.
        transition_layers: Decoder layers whose TTV is summed, ascending, the first one before the
            first stage; None for all from one before the first stage to the last stage.
        alpha: Weight of TTV against text attention, in `[0, 1]`.
        direction: `"signed"` or `"abs"` cosine.

    Raises:
        ConfigError: A value is out of its range, or the schedule is malformed.
        BudgetError: A ratio is out of range.
    """

    summary: ClassVar[str] = "most changed by the layers and attended by the text, at three depths"
    paper: ClassVar[str] = "Li et al., CVPR 2026, arXiv:2507.20630"
    evidence: ClassVar[Evidence] = "code"
    reads: ClassVar[frozenset[Signal]] = frozenset({Signal.QUERY_ATTENTION, Signal.TRANSITION})
    rounding: ClassVar[Rounding] = "floor"

    preset: Literal["high", "low"] = "high"
    layers: tuple[int, ...] | None = None
    ratios: tuple[float, ...] | None = None
    transition_layers: tuple[int, ...] | None = None
    alpha: float = 0.5
    direction: Direction = "signed"

    def validate(self) -> None:
        check_choice("preset", self.preset, PRESETS)
        check_choice("direction", self.direction, get_args(Direction))
        check_number("alpha", self.alpha, low=0.0, high=1.0)
        ratios = PRESETS[self.preset] if self.ratios is None else self.ratios
        check_schedule(self.layers, ratios, PUBLISHED_LAYERS)
        if self.transition_layers is not None:
            check_ascending("transition_layers", self.transition_layers, low=0)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        layers = stage_layers(self.layers, PUBLISHED_LAYERS, num_layers)
        measured = self.transition_layers or tuple(range(layers[0] - 1, layers[-1]))
        if measured[0] >= layers[0] or measured[-1] >= layers[-1]:
            stages = f"start before layer {layers[0]} and end before {layers[-1]}"
            raise ConfigError(f"transition_layers must {stages}, got {measured!r}")
        budgets = stage_budgets(self, self.ratios or PRESETS[self.preset], layers, num_layers)
        return tuple(
            Placement(
                stage=Stage.IN_LLM,
                budget=budget,
                layer=layer,
                queries=Queries.TEXT_AFTER,
                attention_of="next",
                transitions=tuple(done for done in measured if done < layer),
            )
            for layer, budget in zip(layers, budgets, strict=True)
        )

    def score(self, tokens: VisualTokens) -> Float[Tensor, "B N"]:
        """Add `alpha` TTV and `(1 - alpha)` text attention, each scaled to sum 1 over the image."""
        assert tokens.transition is not None  # declared in `reads`, as the attention
        assert tokens.query_attention is not None
        change = summed_variation(tokens.transition, self.direction)
        change = change / (change.sum(dim=1, keepdim=True) + 1e-8)
        if tokens.query_attention.shape[2] == 0:
            return change
        attention = upcast(tokens.query_attention).mean(dim=(1, 2))
        attention = attention / (attention.sum(dim=1, keepdim=True) + 1e-8)
        return self.alpha * change + (1 - self.alpha) * attention
