"""Positional trends of attention: `f` over an image's raster, by which scores are divided.

Published ones belong to LLaVA-1.5-7B, to a method and to the layer where it prunes first.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.checks import check_number
from vispress.errors import ConfigError

Trend = float | tuple[float, ...]
"""The slope of `exp(slope i / size)`, or coefficients of a polynomial in `i / (size - 1)`."""
Variant = Literal["code", "paper"]

SLOPES = {"fastv": 1.0, "pyramiddrop": 2.0, "sparsevlm": 2.0}
FASTV_CURVE = (1.0, 1.7337386219, -4.8264334464, 4.884125654)
STEEPEST = 50.0
"""Largest slope, either way: `exp` stays finite in fp32."""


def published_trend(name: str, variant: Variant) -> Trend:
    """Look up the trend of a method.

    Raises:
        ConfigError: It has none.
    """
    if name not in SLOPES:
        raise ConfigError(
            f"inner: {name} has no published trend ({', '.join(SLOPES)} have); give slope or "
            f"curve, or fit one: vispress fit-debias --method {name}"
        )
    return FASTV_CURVE if (name, variant) == ("fastv", "code") else SLOPES[name]


def trend_weight(index: Int[Tensor, "B N"], size: int, trend: Trend) -> Float[Tensor, "B N"]:
    """Compute `f(0) / f(i)`, fp32; 1 at the first token, smaller where more attention falls.

    Args:
        index: Raster indices i in `[0, size)`.
        size: Tokens of the whole image.
        trend: See `Trend`.
    """
    if isinstance(trend, tuple):
        t = index.double() / max(1, size - 1)
        return (trend[0] / _polynomial(t, trend)).float()
    return torch.exp(index.float() * (-trend / size))


def check_trend(slope: object, curve: object) -> None:
    """Refuse a slope out of range, and a curve that is no polynomial above 0 on `[0, 1]`.

    Raises:
        ConfigError: Another type, not finite, out of range, or both are given.
    """
    if slope is not None:
        check_number("slope", slope, low=-STEEPEST, high=STEEPEST)
    if curve is None:
        return
    if slope is not None:
        raise ConfigError(f"give slope or curve, got {slope!r} and {curve!r}")
    if not isinstance(curve, tuple) or not curve or any(type(c) not in (int, float) for c in curve):
        raise ConfigError(f"curve must be a non-empty tuple of numbers, got {curve!r}")
    lowest = float(_polynomial(torch.linspace(0, 1, 1001, dtype=torch.float64), curve).min())
    if not 0.0 < lowest < float("inf"):  # NaN, too
        raise ConfigError(
            "curve must be coefficients, constant term first, of a polynomial that is above 0 on "
            f"[0, 1]; {curve!r} goes down to {lowest:.3g}"
        )


def _polynomial(t: Tensor, curve: tuple[float, ...]) -> Tensor:
    value = torch.zeros_like(t)
    for coefficient in reversed(curve):
        value = value * t + coefficient
    return value
