"""Per-image budgets: the first image of a prompt may keep more of its tokens than the second.

Composition; for prompts whose images do not matter alike, such as a document and its logo, or
examples and the picture that is asked about.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, final

import torch
from jaxtyping import Int
from torch import Tensor

from vispress.checks import check_number
from vispress.devices import sent
from vispress.errors import ConfigError
from vispress.methods.base import Compressor, Evidence
from vispress.methods.fastv import FastV
from vispress.methods.wrapper import Wrapper
from vispress.registry import register_method
from vispress.types import (
    Memory,
    Placement,
    Signal,
    TokenPlan,
    Transition,
    VisualTokens,
    full_index,
)

_SHARED = ("crops", "two_layer", "projector", "final_norm")
"""What is the same for all images of a bucket, though it holds tensors."""


def select_images(tokens: VisualTokens, rows: Sequence[int]) -> VisualTokens:
    """Select the images at `rows`, each in `[0, B)`, in that order."""

    def pick(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[sent(torch.tensor(rows), value.device)]
        if isinstance(value, tuple) and value and isinstance(value[0], Memory):
            return tuple(value[row] for row in rows)
        if isinstance(value, tuple):
            return tuple(map(pick, value))
        if isinstance(value, Transition | VisualTokens):
            own = {f.name: getattr(value, f.name) for f in fields(value) if f.name not in _SHARED}
            return replace(value, **{name: pick(held) for name, held in own.items()})
        return value

    picked: VisualTokens = pick(tokens)
    return picked


@final
@register_method("per_image")
@dataclass(frozen=True, kw_only=True)
class PerImage(Wrapper):
    """Let another method keep `round(factor K)` tokens of an image, K as its budget gives it.

    At least 1, at every placement. The budget is that of images with a factor of 1, and so the most
    that any image keeps; the report shows each.

    Args:
        inner: A method that keeps tokens as they are, or its name.
        factors: For the first, second, ... image (or video) of a prompt, each in (0, 1]; the last
            one is for all that follow. Images of a later turn are counted anew.

    Raises:
        ConfigError: A factor is out of range, or `inner` merges or decides its own counts.
    """

    summary: ClassVar[str] = "what another method keeps, more or less of it by the image's place"
    paper: ClassVar[str] = "composition"
    evidence: ClassVar[Evidence] = "composition"
    reads: ClassVar[frozenset[Signal]] = FastV.reads

    inner: Compressor | str = field(default_factory=FastV)
    factors: tuple[float, ...] = (1.0,)

    def validate(self) -> None:
        if not isinstance(self.factors, tuple) or not self.factors:
            raise ConfigError(f"factors must be a non-empty tuple of numbers, got {self.factors!r}")
        for factor in self.factors:
            check_number("factors", factor, low=1e-6, high=1.0)
        own = super().adaptive or not self.exact or not self.takes_budget
        if self.weighted and (own or self.merges):
            raise ConfigError(
                f"inner: {self.root.name} merges, or does not keep exactly what it is asked for; "
                "wrap a method that prunes to a budget"
            )

    @property
    def weighted(self) -> bool:
        """Whether any image gets another budget than the method's."""
        return any(factor != 1.0 for factor in self.factors)

    @property
    def adaptive(self) -> bool:
        return self.weighted or super().adaptive

    def signals(self) -> frozenset[Signal]:
        return self.wrapped.signals() | ({Signal.IMAGE_NUMBER} if self.weighted else set())

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        found = super().placements(num_layers)
        if self.weighted and any(placement.adaptive for placement in found):
            raise ConfigError(f"inner: {self.root.name} decides its own counts; give it a budget")
        return tuple(replace(p, adaptive=p.adaptive or self.weighted) for p in found)

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        if not self.weighted:
            return self.acting.plan(tokens, num_keep)
        assert tokens.image_number is not None  # declared in `signals`
        keep: dict[int, Tensor] = {}
        places = [min(n, len(self.factors) - 1) for n in tokens.image_number.tolist()]
        for place in sorted(set(places)):
            rows = [row for row, own in enumerate(places) if own == place]
            count = max(1, round(self.factors[place] * min(num_keep, tokens.num_visual)))
            keep |= dict(zip(rows, self._keep(select_images(tokens, rows), count), strict=True))
        return TokenPlan(keep=tuple(keep[row] for row in range(tokens.batch)))

    def _keep(self, tokens: VisualTokens, count: int) -> Int[Tensor, "B K"]:
        if count == tokens.num_visual:
            return full_index(tokens.batch, count, tokens.features.device)
        found = self.acting.plan(tokens, count).keep
        assert isinstance(found, Tensor)
        return found
