"""Debiasing: take the positional trend and padding out of the LLM's attention before it prunes.

Zhao et al., attention debiasing, 2025, arXiv:2508.17807 (followed is its code).
Source: https://github.com/intcomp/attention-bias at e75ebe7 (patches); through a specification.
Follows the code: the attention that the wrapped method ranks by is multiplied by f(first) / f(i),
and is 0 on padding; at its first pruning stage only. `variant="code"` has the FastV patch's curve,
a cubic; `"paper"` an exponential for every method. Thresholds are the patches'.
Differs: the patches know picture sizes, here padding is found in pixels; SparseVLM's resized mask
is a coverage of 0.5; an image keeps its budget even of padding (`shrink=True`: the FastV patch).
Reconstructed: slopes are means of the released ones, which differ by benchmark; FastV's is a fit.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, final, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vispress.checks import check_choice, check_flag, check_number
from vispress.errors import ConfigError
from vispress.methods._parts.geometry.padding import padding_mask
from vispress.methods._parts.scoring.trend import (
    Trend,
    Variant,
    check_trend,
    published_trend,
    trend_weight,
)
from vispress.methods.base import Compressor, Evidence
from vispress.methods.fastv import FastV
from vispress.methods.wrapper import Wrapper
from vispress.registry import register_method
from vispress.types import Placement, Signal, TokenPlan, VisualTokens


@final
@register_method("debias")
@dataclass(frozen=True, kw_only=True)
class Debias(Wrapper):
    """Correct the attention that another method prunes by.

    Args:
        inner: In-LLM method whose first stage reads attention, or its name.
        variant: Which published trend of `inner` is meant: the patches', or the paper's.
        slope: Trend `exp(slope x)`, x from 0 to 1 over the image (`vispress fit-debias`); 0: none.
        curve: Trend `sum_k curve[k] x^k` in place of a slope, above 0 on `[0, 1]`.
        suppress_padding: Set the attention of padding to 0, in families that pad (LLaVA-1.5).
        threshold: Share of a token's patch above which it is padding; None for the patches'.
        shrink: Keep fewer than asked of images that have fewer tokens beside padding.

    Raises:
        ConfigError: `inner` reads no attention of the LLM, is corrected already, or has no trend.
    """

    summary: ClassVar[str] = "what another method keeps, corrected for position and padding"
    paper: ClassVar[str] = "Zhao et al. 2025, arXiv:2508.17807"
    evidence: ClassVar[Evidence] = "code"
    reads: ClassVar[frozenset[Signal]] = frozenset({Signal.QUERY_ATTENTION, Signal.PADDING})

    inner: Compressor | str = field(default_factory=FastV)
    variant: Variant = "code"
    slope: float | None = None
    curve: tuple[float, ...] | None = None
    suppress_padding: bool = True
    threshold: float | None = None
    shrink: bool = False

    def validate(self) -> None:
        check_choice("variant", self.variant, get_args(Variant))
        check_flag("suppress_padding", self.suppress_padding)
        check_flag("shrink", self.shrink)
        check_trend(self.slope, self.curve)
        check_number("threshold", self.threshold or 0.0, low=0.0, high=1.0)
        name = self.root.name
        if Signal.QUERY_ATTENTION not in self.wrapped.signals():
            raise ConfigError(f"inner: {name} reads no attention of the LLM; wrap fastv or another")
        if any(isinstance(method, Debias) for method in self.nested()):
            raise ConfigError(f"inner: {name} is corrected by a debias inside; leave one out")
        _ = self.trend  # raises where there is none
        if self.shrink and (self.merges or super().adaptive):
            raise ConfigError(f"shrink: {name} merges or decides its own counts; leave it out")

    @property
    def trend(self) -> Trend:
        """The trend that is removed."""
        given = self.curve if self.slope is None else self.slope
        return published_trend(self.root.name, self.variant) if given is None else given

    @property
    def adaptive(self) -> bool:
        return self.shrink or super().adaptive

    def signals(self) -> frozenset[Signal]:
        return self.wrapped.signals() | ({Signal.PADDING} if self.suppress_padding else set())

    def uncapturable(self) -> str | None:
        return (
            "padding of an image is counted on the host" if self.shrink else super().uncapturable()
        )

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        first, *later = super().placements(num_layers)
        if first.queries is None:
            raise ConfigError(f"inner: {self.root.name} reads no attention at its first stage")
        return (replace(first, adaptive=first.adaptive or self.shrink), *later)

    def weight(self, tokens: VisualTokens) -> Float[Tensor, "B N"]:
        """Compute what attention is multiplied by, fp32: 1 at the first token, 0 on padding."""
        weight = trend_weight(tokens.index, tokens.num_original, self.trend)
        padded = self.padded(tokens)
        return weight if padded is None else weight.masked_fill(padded, 0.0)

    def padded(self, tokens: VisualTokens) -> Bool[Tensor, "B N"] | None:
        """Mark tokens that count as padding; None where nothing is padded."""
        if not self.suppress_padding or tokens.padding is None:
            return None
        return padding_mask(tokens.padding, self.root.name, self.threshold)

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        entered = tokens.num_original if tokens.num_entered is None else tokens.num_entered
        if tokens.num_visual < entered:
            return self.acting.plan(tokens, num_keep)
        assert tokens.query_attention is not None  # `placements` saw to it
        attention = tokens.query_attention * self.weight(tokens)[:, None, None]
        plan = self.acting.plan(replace(tokens, query_attention=attention), num_keep)
        padded = self.padded(tokens) if self.shrink and num_keep < tokens.num_visual else None
        if padded is None:
            return plan
        rows = zip(plan.keep, padded, strict=True)
        return TokenPlan(keep=tuple(keep[~own[keep]] for keep, own in rows))
