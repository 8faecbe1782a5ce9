"""Schedules of methods that drop tokens at several depths: layers, and a budget for each.

Three ways to ask, in `stage_budgets`:

* no budget: the published ratios of the original token count;
* `keep_ratio` or `mean_keep_ratio`: the mean of visual tokens over decoder layers. The ratios are
  the published ones raised to a common power, the one-parameter family that runs through the
  published point (power 1), keeps the ratios non-increasing and reaches 1 (power 0) and 0. Ours,
  no paper's;
* `num_tokens`: what is left after the last placement; earlier ones keep the published proportion to
  it (`0.5, 0.25, 0.125` gives `4n, 2n, n`). Ours too.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise, product

from vispress.budget import Budget, check_ratio, scaled_layers
from vispress.checks import check_ascending
from vispress.errors import BudgetError, ConfigError
from vispress.methods.base import Compressor, check_layer


def check_schedule(
    layers: Sequence[int] | None,
    ratios: Sequence[float] | None,
    published: Sequence[int],
    *,
    last_may_be_zero: bool = False,
) -> None:
    """Refuse layers out of order, and ratios that grow, leave `(0, 1]` or are too many or few.

    Args:
        layers: As given by the user; None for `published`.
        ratios: As given by the user; None where any number of layers has ratios.
        published: The layers that stand in for None.
        last_may_be_zero: Whether the last stage may drop all tokens.

    Raises:
        ConfigError: Either list is malformed, or their lengths differ.
        BudgetError: A ratio is out of range.
    """
    if layers is not None:
        check_ascending("layers", layers, low=1)
    if ratios is not None:
        if not isinstance(ratios, tuple) or not ratios:
            raise ConfigError(f"ratios must be a non-empty tuple of numbers, got {ratios!r}")
        none_left = last_may_be_zero and ratios[-1] == 0
        for ratio in ratios[:-1] if none_left else ratios:
            check_ratio("ratios", ratio)
        if list(ratios) != sorted(ratios, reverse=True):
            raise ConfigError(f"ratios must not grow from stage to stage, got {ratios!r}")
        stages = published if layers is None else layers
        if len(stages) != len(ratios):
            raise ConfigError(f"ratios and layers must be equally long: {ratios!r}, {stages!r}")


def stage_layers(
    layers: tuple[int, ...] | None, published: Sequence[int], num_layers: int
) -> tuple[int, ...]:
    """Check the given layers against the LLM's depth, or scale the published ones to it.

    Raises:
        ConfigError: A layer is out of range, or the LLM has too few layers.
    """
    if layers is None:
        return scaled_layers(published, num_layers)
    for layer in layers:
        check_layer("layers", layer, num_layers)
    return layers


def power_ratios(
    published: Sequence[float], mean_keep_ratio: float, layers: Sequence[int], num_layers: int
) -> tuple[float, ...]:
    """Raise published ratios to the common power that gives this mean over decoder layers.

    Raises:
        BudgetError: Layers that keep everything hold more than the mean allows.
    """
    check_ratio("keep_ratio", mean_keep_ratio)
    spans = [end - start for start, end in zip(layers, [*layers[1:], num_layers], strict=True)]
    exponents = [-math.log2(ratio) for ratio in published]  # ratio = 0.5 ** exponent

    def mean(x: float) -> float:
        later = math.fsum(span * math.pow(x, e) for span, e in zip(spans, exponents, strict=True))
        return (layers[0] + later) / num_layers

    if mean(0.0) >= mean_keep_ratio and mean_keep_ratio < 1.0:
        raise BudgetError(
            f"a mean of {mean_keep_ratio} over {num_layers} layers cannot be reached when the "
            f"first placement is before layer {layers[0]}: the minimum is above {mean(0.0):.3f}; "
            "ask for more or give earlier `layers`"
        )
    low, high = 0.0, 1.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) < mean_keep_ratio else (low, middle)
    return tuple(math.pow(high, e) for e in exponents)


@cache
def solve_layers(mean_keep_ratio: float, stride: int, num_layers: int) -> tuple[int, ...]:
    """Find layers at each of which one token of `stride` stays, with about this mean.

    Three of them, or as many more as the mean needs, with evenly growing gaps (from the embeddings
    on) but for the last. Of such lists the closest to the mean; then the one whose smallest gap is
    largest, whose gaps change least, and that begins earliest.

    Args:
        mean_keep_ratio: In `(0, 1]`.
        stride: At least 2.
        num_layers: Depth.

    Raises:
        BudgetError: Dropping before every layer leaves more than the mean.
    """
    check_ratio("mean_keep_ratio", mean_keep_ratio)
    for stages in range(min(3, num_layers - 1), num_layers):
        least = _mean_of(tuple(range(1, stages + 1)), stride, num_layers)
        if least <= mean_keep_ratio:
            found = _layers_of(stages, mean_keep_ratio, stride, num_layers)
            return min(found, key=lambda layers: _fit(layers, mean_keep_ratio, stride, num_layers))
    raise BudgetError(
        f"a mean of {mean_keep_ratio} over {num_layers} layers cannot be reached by keeping one "
        f"token of {stride} at a time from layer 1 on: the minimum is {least:.3f}; ask for more"
    )


def _mean_of(layers: Sequence[int], stride: int, num_layers: int) -> float:
    spans = pairwise((0, *layers, num_layers))
    return math.fsum((b - a) * float(stride) ** -i for i, (a, b) in enumerate(spans)) / num_layers


def _layers_of(
    stages: int, mean_keep_ratio: float, stride: int, num_layers: int
) -> Iterator[tuple[int, ...]]:
    """List evenly growing gaps, then a last layer that comes close to the mean."""
    depths, high = range(1, num_layers), num_layers - 1
    # the mean grows by the same with every layer that the last reduction waits
    step = (stride - 1) * float(stride) ** -stages / num_layers
    for gap, growth in product(depths, range(-num_layers, num_layers)):
        first = tuple(i * gap + i * (i - 1) // 2 * growth for i in range(1, stages))
        if any(b <= a for a, b in pairwise((0, *first, num_layers - 1))):
            continue
        at_zero = _mean_of((*first, num_layers), stride, num_layers) - num_layers * step
        last = math.floor((mean_keep_ratio - at_zero) / step)
        low = (first[-1] if first else 0) + 1
        yield from {(*first, min(high, max(low, layer))) for layer in (last, last + 1)}


def _fit(
    layers: tuple[int, ...], mean_keep_ratio: float, stride: int, num_layers: int
) -> tuple[float, int, int, tuple[int, ...]]:
    """Compute what `solve_layers` makes smallest."""
    gaps = [b - a for a, b in pairwise((0, *layers))]
    change = sum((b - a) ** 2 for a, b in pairwise(gaps))
    error = round(abs(_mean_of(layers, stride, num_layers) - mean_keep_ratio), 9)
    return error, -min(gaps), change, layers


def stage_budgets(
    compressor: Compressor, published: Sequence[float], layers: Sequence[int], num_layers: int
) -> tuple[Budget, ...]:
    """Make a budget for each layer, as the module's docstring says.

    Raises:
        BudgetError: The mean cannot be reached.
    """
    if (last := compressor.num_tokens) is not None:
        counts = (round(last * ratio / published[-1]) for ratio in published)
        return tuple(Budget(num_tokens=count) for count in counts)
    mean = compressor.keep_ratio
    if mean is None:
        mean = compressor.mean_keep_ratio
    ratios = published if mean is None else power_ratios(published, mean, layers, num_layers)
    return tuple(Budget(keep_ratio=ratio, rounding=compressor.rounding) for ratio in ratios)


def entry_budgets(
    compressor: Compressor, entry: float, layer: int, num_layers: int
) -> tuple[Budget, Budget]:
    """Make budgets of a method that prunes before the LLM and once more before `layer`.

    Args:
        compressor: Whose `keep_ratio` or `mean_keep_ratio` is the mean over decoder layers, or
            whose `num_tokens` the second placement leaves.
        entry: Tokens that enter the LLM, of that mean (at most all); in proportion to `num_tokens`
            as the published half of the mean.
        layer: Decoder layer of the second placement.
        num_layers: Depth.

    Raises:
        BudgetError: None is set, or the mean cannot be reached.
    """
    if (last := compressor.num_tokens) is not None:
        first = round(last * entry / (2 - entry))
        return Budget(num_tokens=first), Budget(num_tokens=last)
    mean = compressor.budget(num_layers).keep_ratio if compressor.mean_keep_ratio is None else None
    mean = compressor.mean_keep_ratio if mean is None else mean
    assert mean is not None
    start = min(1.0, entry * mean)
    rest = 1.0 if mean == 1.0 else (mean * num_layers - start * layer) / (num_layers - layer)
    if rest <= 0.0:
        raise BudgetError(
            f"a mean of {mean} over {num_layers} layers cannot be reached when {start} of the "
            f"tokens stay until layer {layer}; give an earlier `layer`"
        )
    kinds = compressor.rounding
    return Budget(keep_ratio=start, rounding=kinds), Budget(keep_ratio=rest, rounding=kinds)


def pair_budgets(
    compressor: Compressor, share: float, layer: int, num_layers: int
) -> tuple[Budget, Budget]:
    """Make budgets of a method that prunes before the LLM, then to `share` of that.

    Args:
        compressor: As in `entry_budgets`.
        share: Of the first budget, in `(0, 1]`; more where a mean asks for all tokens in front.
        layer: Decoder layer of the second placement.
        num_layers: Depth.

    Raises:
        BudgetError: None is set.
    """
    if (last := compressor.num_tokens) is not None:
        return Budget(num_tokens=round(last / share)), Budget(num_tokens=last)
    entry = num_layers / (layer + share * (num_layers - layer))
    return entry_budgets(compressor, entry, layer, num_layers)
