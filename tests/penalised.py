"""A method with a probe that is trained, losses and a schedule: what training tests compress by."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from vispress.budget import Budget
from vispress.methods.base import Compressor, top_indices
from vispress.types import ModuleShape, Placement, Stage, TokenPlan, VisualTokens


class Probe(nn.Module):
    """Reads one number a token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, features: Tensor) -> Tensor:
        return features @ self.weight.to(features)


@dataclass(frozen=True, kw_only=True)
class Penalised(Compressor):
    """Ranks by a trained probe, and is to make its scores small; keeps more at first."""

    name: ClassVar[str] = "penalised"
    summary: ClassVar[str] = "what a probe finds"
    paper: ClassVar[str] = "control"
    trained: ClassVar[bool] = True

    keep_ratio: float | None = 0.25
    layers: tuple[int, ...] = (1, 3)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        ratio = self.keep_ratio or 1.0
        return tuple(
            Placement(stage=Stage.IN_LLM, budget=Budget(keep_ratio=ratio / 2**i), layer=layer)
            for i, layer in enumerate(self.layers)
        )

    def make_module(self, shape: ModuleShape) -> Probe:
        return Probe(shape.width)

    def at(self, progress: float) -> "Penalised":
        return replace(self, keep_ratio=1.0 - 0.75 * progress)

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        assert tokens.module is not None
        score = tokens.module(tokens.features)
        losses = {"size": score.square().mean(1), "ones": torch.ones(len(score))}
        return TokenPlan(keep=top_indices(score.detach(), num_keep), losses=losses)
