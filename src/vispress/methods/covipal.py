"""CoViPAL: a small trained network in front of some layers says which tokens these still need.

Tang et al., "CoViPAL: Layer-wise Contextualized Visual Token Pruning for Large Vision-Language
Models", Findings of EMNLP 2025, arXiv:2508.17243.
Source: the abstract, through a specification; no code was reachable.
Follows the abstract: a plug-in module (PPM) scores the visual tokens from their hidden states and
those of the text, S = p(H_v, H_t), and the highest stay. It is trained with the model frozen, in
two stages: to what a deeper layer attends to, then by the answer's loss through soft removal, in
which the log of a mask joins the attention logits.
Reconstructed, for the abstract says no more: the network (norm and linear map to 256 of both
streams; self-attention, attention to the text and an MLP of 512; a norm and a linear map), the
layers 2, 8 and 16 of 32 with half of the tokens kept at each, and the masks. By default the mask is
the sigmoid of how far a score is past the threshold that the budget sets, of standardised scores,
at a temperature that falls from 0.1 to 0.02: ours, chosen on the reference model, where soft tokens
at temperature 1 teach nothing (all stay visible). `mask="penalty"` is the specification's: the
sigmoid of the score itself, with (mean - share)^2 in the loss, for temperatures from 1 to 0.1.
Differs: the text is the prompt's behind the image; at later layers tokens that an earlier one would
have dropped neither compete nor are looked at.
Untrained its choice means nothing; nobody ships weights. `vispress train-compressor --method
covipal` trains both stages, the first by default.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, final, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vispress.checks import check_choice, check_integer, check_number
from vispress.errors import ConfigError
from vispress.kinds import Evidence, Softens
from vispress.memory import Memory
from vispress.methods._parts.networks.layers import Attend, Dense, FeedForward, Norm
from vispress.methods._parts.schedules.stage_budgets import (
    check_schedule,
    stage_budgets,
    stage_layers,
)
from vispress.methods._parts.scoring.soft_choice import past_threshold, standardised
from vispress.methods.base import Compressor, top_indices
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

LAYERS = (2, 8, 16)
SHARE = 0.5
"""Kept from layer to layer."""
Mask = Literal["threshold", "penalty"]


class PruningModule(nn.Module):
    """Score visual tokens by themselves, each other and the text (the paper's PPM).

    Args:
        width_in: Of hidden states.
        width: Inside; twice as much in its MLP.
        heads: Of its attention, a divisor of the width.
    """

    def __init__(self, width_in: int, *, width: int, heads: int) -> None:
        super().__init__()
        self.visual = nn.Sequential(Norm(width_in), Dense(width_in, width))
        self.text = nn.Sequential(Norm(width_in), Dense(width_in, width))
        self.among, self.across = Attend(width, heads), Attend(width, heads)
        self.alone = FeedForward(width)
        self.out = nn.Sequential(Norm(width), Dense(width, 1))

    def forward(
        self,
        features: Float[Tensor, "B N D"],
        text: Float[Tensor, "B T D"],
        valid: Bool[Tensor, "B T"] | None = None,
        seen: Bool[Tensor, "B N"] | None = None,
    ) -> Float[Tensor, "B N"]:
        """Score tokens, in at least fp32; any range.

        Args:
            features: Hidden states of visual tokens.
            text: Of the text; T may be 0.
            valid: False on padding of the text; each row has a valid token.
            seen: Visual tokens that others look at; None for all.
        """
        with full_precision():  # training runs it outside of a plan, perhaps under autocast
            x = self.visual(features)
            x = self.among(x, x, seen)
            x = self.alone(self.across(x, self.text(text), valid))
            score: Tensor = self.out(x)[..., 0]
        return score


class PruningModules(nn.Module):
    """One of them for each pruning layer.

    Args:
        layers: Decoder layers.
        width_in: Of hidden states.
        width: Inside.
        heads: Of attention.
    """

    def __init__(self, layers: tuple[int, ...], width_in: int, *, width: int, heads: int) -> None:
        super().__init__()
        for layer in layers:
            self.add_module(str(layer), PruningModule(width_in, width=width, heads=heads))

    def forward(self, layer: int, *args: Tensor | None) -> Float[Tensor, "B N"]:
        """Score tokens in front of a decoder layer (see `PruningModule.forward`)."""
        score: Tensor = self.get_submodule(str(layer))(*args)
        return score


@final
@register_method("covipal")
@dataclass(frozen=True, kw_only=True)
class CoViPAL(Compressor):
    """Prune at several depths, each time by a trained network that reads the text, too.

    Without a budget the share of `ratios` stays at each layer. `keep_ratio` is the mean over
    decoder layers, as `mean_keep_ratio`; `num_tokens` is what the last layer leaves (earlier ones:
    `ratios` in proportion).

    Args:
        layers: Decoder layers before which tokens are dropped, ascending; None for 2, 8 and 16 of
            32, scaled by depth.
        ratios: Kept share of the original tokens at each, not growing; None to halve each time.
        width: Of the network, a multiple of `heads`.
        heads: Of its attention.
        mask: In training: by the budget's `"threshold"`, or with a `"penalty"` on the mean.
        temperature: Of the mask, where training begins; above 0.
        end_temperature: Where it ends.
        penalty: Weight of the penalty, at least 0.

    Raises:
        ConfigError: The schedule is malformed, or a value is out of range.
    """

    summary: ClassVar[str] = "what trained networks at three depths choose, by the text, too"
    paper: ClassVar[str] = "Tang et al., EMNLP Findings 2025, arXiv:2508.17243"
    evidence: ClassVar[Evidence] = "reconstructed"
    reads: ClassVar[frozenset[Signal]] = frozenset({Signal.TEXT_STATES, Signal.DEPTH})
    trained: ClassVar[bool] = True
    softens: ClassVar[Softens | None] = "keys"
    default_positions: ClassVar[Positions] = "original"

    layers: tuple[int, ...] | None = None
    ratios: tuple[float, ...] | None = None
    width: int = 256
    heads: int = 4
    mask: Mask = "threshold"
    temperature: float = 0.1
    end_temperature: float = 0.02
    penalty: float = 1.0

    def validate(self) -> None:
        check_schedule(self.layers, self.ratios, LAYERS)
        for name in ("width", "heads"):
            check_integer(name, getattr(self, name), low=1)
        if self.width % self.heads:
            raise ConfigError(
                f"width must be a multiple of heads={self.heads}, got width={self.width}"
            )
        check_choice("mask", self.mask, get_args(Mask))
        for name in ("temperature", "end_temperature"):
            check_number(name, getattr(self, name), low=1e-4, high=100.0)
        check_number("penalty", self.penalty, low=0.0, high=1e6)

    def at(self, progress: float) -> "CoViPAL":
        """The temperature falls by the same factor with every step."""
        fall = self.end_temperature / self.temperature
        return replace(self, temperature=self.temperature * fall**progress)

    def stages(self, num_layers: int) -> tuple[int, ...]:
        """Give the layers that it acts before in an LLM of some depth."""
        return stage_layers(self.layers, LAYERS, num_layers)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        layers = self.stages(num_layers)
        ratios = self.ratios or tuple(SHARE ** (i + 1) for i in range(len(layers)))
        budgets = stage_budgets(self, ratios, layers, num_layers)
        return tuple(
            Placement(stage=Stage.IN_LLM, budget=budget, layer=layer)
            for layer, budget in zip(layers, budgets, strict=True)
        )

    def make_module(self, shape: ModuleShape) -> PruningModules:
        layers = self.stages(shape.num_layers)
        return PruningModules(layers, shape.width, width=self.width, heads=self.heads)

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        assert tokens.module is not None  # `trained`
        assert tokens.depth is not None  # declared in `reads`
        left = _left(tokens)
        given = tokens.depth[0], tokens.features, tokens.text_states, None, left
        score: Tensor = tokens.module(*given)
        ranked = score.detach() if left is None else score.detach().masked_fill(~left, -torch.inf)
        keep = top_indices(ranked, num_keep)
        if not tokens.training:
            return TokenPlan(keep=keep)
        kept = torch.zeros_like(score, dtype=torch.bool).scatter(1, keep, True)
        memory = tuple(Memory(value=row) for row in kept)
        if self.mask == "threshold":
            of_each = standardised(score, left)
            soft = past_threshold(of_each, num_keep, self.temperature, left)
            return TokenPlan(keep=keep, soft=_positive(soft), memory=memory)
        soft = (score / self.temperature).sigmoid()
        excess = soft.mean(dim=1) - num_keep / tokens.num_visual
        losses = {"covipal": self.penalty * excess.square()}
        return TokenPlan(keep=keep, soft=_positive(soft), memory=memory, losses=losses)


def _left(tokens: VisualTokens) -> Tensor | None:
    """`[B, N]` bool: in training, what the layer before would have left; None for all."""
    if not tokens.memory:
        return None
    rows = [row.value for row in tokens.memory if isinstance(row.value, Tensor)]
    return torch.stack(rows).to(tokens.features.device)


def _positive(soft: Tensor) -> Tensor:
    """Keep a mask above 0, where a sigmoid is 0 as a number (without a gradient there)."""
    return soft.clamp(min=torch.finfo(soft.dtype).tiny)
