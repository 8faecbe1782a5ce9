"""Budgets: the only place where a ratio becomes a count or a published layer number is scaled."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from vispress.errors import BudgetError, ConfigError

Rounding = Literal["floor", "round", "ceil"]

PUBLISHED_DEPTH = 32
"""Decoder layers of the 7B models that published layer numbers belong to."""

_RULES: dict[Rounding, Callable[[float], int]] = {
    "floor": math.floor,
    "round": round,  # half to even, as Python and the official implementations do
    "ceil": math.ceil,
}


def check_ratio(name: str, value: float) -> None:
    """Refuse a fraction outside `(0, 1]`.

    Raises:
        BudgetError: The value is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value <= 1.0:
        raise BudgetError(f"{name} must be a number in (0, 1], got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How many visual tokens of one image a placement keeps.

    Args:
        keep_ratio: Fraction in `(0, 1]` of the tokens that reached the compressor's first
            placement.
        num_tokens: Count per image, at least 0; an image with fewer tokens stays whole.
        rounding: How `keep_ratio * n` becomes a count; each method follows its official code.

    Raises:
        BudgetError: Both or neither is given, or a value is out of range.
    """

    keep_ratio: float | None = None
    num_tokens: int | None = None
    rounding: Rounding = "round"

    def __post_init__(self) -> None:
        if (self.keep_ratio is None) == (self.num_tokens is None):
            raise BudgetError(
                "give exactly one of keep_ratio and num_tokens, "
                f"got keep_ratio={self.keep_ratio!r} and num_tokens={self.num_tokens!r}"
            )
        if self.keep_ratio is not None:
            check_ratio("keep_ratio", self.keep_ratio)
        if self.num_tokens is not None and (
            isinstance(self.num_tokens, bool)
            or not isinstance(self.num_tokens, int)
            or self.num_tokens < 0
        ):
            raise BudgetError(f"num_tokens must be an integer >= 0, got {self.num_tokens!r}")

    def resolve(self, num_visual: int) -> int:
        """The count to keep out of `num_visual`; a ratio keeps at least one token."""
        if self.num_tokens is not None:
            return min(self.num_tokens, num_visual)
        assert self.keep_ratio is not None
        if self.keep_ratio == 1.0:
            return num_visual
        return min(num_visual, max(1, _RULES[self.rounding](self.keep_ratio * num_visual)))


def allocate(total: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """Split `total` over parts in proportion to `sizes` (largest remainder; ties: earlier part).

    No part gets more than its size; the sum is exactly `min(total, sum(sizes))`.
    """
    whole = sum(sizes)
    if total >= whole:
        return tuple(sizes)
    shares = [total * size // whole for size in sizes]
    # exact integer remainders: no float ties
    order = sorted(range(len(sizes)), key=lambda i: (-(total * sizes[i] % whole), i))
    for i in order[: total - sum(shares)]:
        shares[i] += 1
    return tuple(shares)


def scaled_layer(published: int, num_layers: int, *, low: int = 1) -> int:
    """A layer number of a 32-layer LLM, moved to the same relative depth of another.

    Returns:
        A layer in `[low, num_layers - 1]`; `published` itself when `num_layers` is 32.
    """
    return min(num_layers - 1, max(low, round(published * num_layers / PUBLISHED_DEPTH)))


def scaled_layers(published: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """`scaled_layer` for several, kept strictly increasing.

    Raises:
        ConfigError: The LLM has too few layers to hold that many placements.
    """
    count = len(published)
    if num_layers <= count:
        raise ConfigError(
            f"{count} placements need at least {count + 1} decoder layers, got {num_layers}"
        )
    layers: list[int] = []
    for i, layer in enumerate(published):
        low = layers[-1] + 1 if layers else 1
        high = num_layers - (count - i)
        layers.append(min(high, max(low, scaled_layer(layer, num_layers))))
    return tuple(layers)


def ratio_left(mean_keep_ratio: float, shares: Sequence[float], num_layers: int) -> float:
    """The ratio that, from layer `len(shares)` on, gives this mean over decoder layers.

    Args:
        mean_keep_ratio: In `(0, 1]`.
        shares: Fraction of the tokens that each decoder layer so far has seen.
        num_layers: Depth, more than there are shares.

    Returns:
        At most 0 where the layers so far have used up the mean; above 1 where all may stay.
    """
    return (mean_keep_ratio * num_layers - math.fsum(shares)) / (num_layers - len(shares))


def ratio_for_mean(mean_keep_ratio: float, layer: int, num_layers: int) -> float:
    """The ratio that, applied once before `layer`, gives this mean over decoder layers.

    Raises:
        BudgetError: The layers before the placement alone hold more than the mean allows.
    """
    check_ratio("mean_keep_ratio", mean_keep_ratio)
    ratio = ratio_left(mean_keep_ratio, (1.0,) * layer, num_layers)
    if ratio <= 0.0:
        raise BudgetError(
            f"mean_keep_ratio={mean_keep_ratio} cannot be reached by pruning before layer "
            f"{layer} of "
            f"{num_layers}: the layers before it alone give {layer / num_layers:.3f}; "
            "ask for more or prune earlier"
        )
    return min(1.0, ratio)


def geometric_ratios(
    mean_keep_ratio: float, layers: Sequence[int], num_layers: int
) -> tuple[float, ...]:
    """Ratios `(x, x^2, x^3, ...)` at `layers` whose mean over decoder layers is as asked.

    Raises:
        BudgetError: The layers before the first placement hold more than the mean allows.
    """
    check_ratio("keep_ratio", mean_keep_ratio)
    spans = [end - start for start, end in zip(layers, [*layers[1:], num_layers], strict=True)]

    def mean(x: float) -> float:
        later = sum(span * x ** (i + 1) for i, span in enumerate(spans))
        return (layers[0] + later) / num_layers

    if mean(0.0) >= mean_keep_ratio:
        raise BudgetError(
            f"a mean of {mean_keep_ratio} over {num_layers} layers cannot be reached when the "
            "first "
            f"placement is before layer {layers[0]}: the minimum is above {mean(0.0):.3f}; "
            "ask for more or give earlier `layers`"
        )
    low, high = 0.0, 1.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) < mean_keep_ratio else (low, middle)
    return tuple(high ** (i + 1) for i in range(len(spans)))
