"""The positional trend of a model's attention over its images, measured and fitted."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.api import compress_model, remove_compression
from vispress.bench.model.loaded_model import LoadedModel
from vispress.bench.tasks.task import Prompt
from vispress.budget import Budget
from vispress.errors import BudgetError, ConfigError
from vispress.methods._parts.geometry.padding import padding_mask
from vispress.methods._parts.scoring.text_raters import relation
from vispress.methods._parts.scoring.trend import STEEPEST
from vispress.methods.base import Compressor
from vispress.methods.wrapper import Wrapper
from vispress.types import Placement, Signal, TokenPlan, VisualTokens, full_index

Shape = Literal["exponential", "cubic"]


@dataclass(eq=False)
class Profile:
    """Attention by place in the raster, summed over images; one row for each size of image.

    Every image counts the same: its attention is divided by its mean over tokens that are no
    padding, which alone are counted.
    """

    rows: dict[int, Float[Tensor, "2 N"]] = field(default_factory=dict)
    """Sums and counts, fp64 on the host, by tokens of an image."""
    images: int = 0

    def add(
        self,
        attention: Float[Tensor, "B K"],
        index: Int[Tensor, "B K"],
        size: int,
        valid: Tensor,
    ) -> None:
        """Count images of `size` tokens, of which those at `index` are there.

        Args:
            attention: Of any scale; images without any are left out.
            index: Raster indices.
            size: N0.
            valid: `[B, K]` bool, False on padding.
        """
        attention, valid = attention.double().cpu(), valid.cpu()
        total = (attention * valid).sum(dim=1, keepdim=True)
        mean = total / valid.sum(dim=1, keepdim=True)
        seen = mean[:, 0].isfinite() & (mean[:, 0] > 0)
        values = (attention * valid / mean)[seen]
        row = self.rows.setdefault(size, torch.zeros(2, size, dtype=torch.float64))
        where = index.cpu()[seen].flatten()
        row[0].index_add_(0, where, values.flatten())
        row[1].index_add_(0, where, valid[seen].double().flatten())
        self.images += int(seen.sum())

    def points(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`(i / N, i / (N - 1), mean attention, count)` of every place that was seen, fp64.

        Raises:
            ConfigError: No image was seen.
        """
        parts = []
        for size, (total, count) in self.rows.items():
            places = torch.arange(size, dtype=torch.float64)
            own = torch.stack([places / size, places / max(1, size - 1), total / count, count])
            parts.append(own[:, count > 0])
        if not self.images:
            raise ConfigError("no image was attended to: give prompts with text behind the image")
        joined = torch.cat(parts, dim=1)
        return joined[0], joined[1], joined[2], joined[3]


@dataclass(frozen=True)
class Fit:
    """A fitted trend.

    Args:
        slope: Of an exponential, else None.
        curve: Coefficients of a polynomial, constant term first and 1, else None.
        explained: Share of the profile's variance over places, at most 1; 0 for a flat profile.
        images: Images it was measured on.
    """

    slope: float | None
    curve: tuple[float, ...] | None
    explained: float
    images: int


def fit_trend(profile: Profile, shape: Shape = "exponential") -> Fit:
    """Least squares over the mean profile, every place weighed by the images that have it.

    Raises:
        ConfigError: No image was seen, the slope is out of range, or the cubic is not above 0.
    """
    x, t, value, count = profile.points()
    if shape == "cubic":
        powers = t[:, None] ** torch.arange(4)
        root = count.sqrt()[:, None]
        solved = torch.linalg.lstsq(powers * root, value[:, None] * root, driver="gelsd").solution
        fitted = (powers @ solved)[:, 0]
        curve = tuple((solved[:, 0] / solved[0, 0]).tolist())
        return Fit(None, curve, _explained(value, fitted, count), profile.images)
    slope = _slope(x, value, count)
    base = torch.exp(slope * x)
    scale = (count * value * base).sum() / (count * base.square()).sum()
    return Fit(slope, None, _explained(value, scale * base, count), profile.images)


def _slope(x: Tensor, value: Tensor, count: Tensor) -> float:
    """The slope of the best `scale exp(slope x)`; the best scale of each slope is known."""

    def gain(slope: float) -> float:  # what the residual lacks of the values' own squares
        base = torch.exp(slope * (x - 0.5))  # centred: large slopes do not overflow
        return float((count * value * base).sum() ** 2 / (count * base.square()).sum())

    steps = [STEEPEST * i / 500 for i in range(-500, 501)]
    best = max(steps, key=gain)
    low, high = best - STEEPEST / 500, best + STEEPEST / 500
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(80):
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if gain(left) >= gain(right) else (left, high)
    return min(STEEPEST, max(-STEEPEST, (low + high) / 2))


def _explained(value: Tensor, fitted: Tensor, count: Tensor) -> float:
    mean = (count * value).sum() / count.sum()
    whole = (count * (value - mean).square()).sum()
    left = (count * (value - fitted).square()).sum()
    return float(1 - left / whole) if float(whole) > 1e-12 * float(count.sum()) else 0.0


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Probe(Wrapper):
    """Looks at attention where a method first prunes, and keeps everything.

    Args:
        inner: The method; a budget is not needed.
        profile: What is seen.
    """

    name: ClassVar[str] = "fit_debias"
    summary: ClassVar[str] = "everything"
    paper: ClassVar[str] = "none"

    profile: Profile

    def validate(self) -> None:
        object.__setattr__(self, "merges", False)

    def signals(self) -> frozenset[Signal]:
        return self.wrapped.signals() | {Signal.PADDING}

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        try:
            first = self.acting.placements(num_layers)[0]
        except BudgetError:
            first = replace(self.acting, keep_ratio=0.5).placements(num_layers)[0]
        if first.queries is None:
            raise ConfigError(f"{self.root.name} reads no attention of the LLM at its first stage")
        return (replace(first, budget=Budget(keep_ratio=1.0), adaptive=True),)

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        assert tokens.query_attention is not None
        if self.root.name == "sparsevlm":
            attention = relation(tokens)[0]
        else:
            attention = tokens.query_attention.mean(dim=(1, 2))
        valid = torch.ones_like(attention, dtype=torch.bool)
        if tokens.padding is not None:
            valid = ~padding_mask(tokens.padding, self.root.name, None)
        self.profile.add(attention, tokens.index, tokens.num_original, valid)
        device = tokens.features.device
        return TokenPlan(keep=full_index(tokens.batch, tokens.num_visual, device))


def measure(
    loaded: LoadedModel, prompts: Iterable[Prompt], method: Compressor, batch_size: int = 8
) -> Profile:
    """The attention that `method` would rank by at its first stage, over prompts of the user's.

    Args:
        loaded: The model, uncompressed.
        prompts: Each with pictures; read batch by batch.
        method: What is to be corrected.
        batch_size: Prompts of a batch.

    Raises:
        ConfigError: The method reads no attention there.
        CompressionStateError: The model is compressed.
    """
    profile = Profile()
    compress_model(loaded.model, Probe(inner=method, profile=profile))
    left = iter(prompts)
    try:
        with torch.no_grad():
            while batch := list(islice(left, batch_size)):
                loaded.model(**loaded.encode(batch), use_cache=False)
    finally:
        remove_compression(loaded.model)
    return profile
