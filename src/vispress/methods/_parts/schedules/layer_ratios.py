"""Keep ratios by decoder layer: a sigmoid in depth, and few placements that stand for many ratios.

A ratio is the share of an image's original visual tokens that enters a layer; layer 0 has all.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache

from vispress.errors import BudgetError

STAGES = 8
"""Placements at most: each reads a row of attention and moves what is left."""
LEAST_CHANGE = 0.01
"""Of the original tokens, that a placement must drop."""
_MIDPOINTS = (-1.0, 2.0)


def sigmoid_ratios(
    steepness: float, midpoint: float, floor: float, num_layers: int
) -> tuple[float, ...]:
    """Compute `1 / (1 + exp(a (l / L - b)))`, stretched to 1 at layer 0 and `floor` at depth L.

    Args:
        steepness: a, in `[0.01, 100]`.
        midpoint: b, in `[-1, 2]` of the depth.
        floor: In `[0, 1]`.
        num_layers: L.
    """
    first, *inner, last = (
        math.exp(steepness * (layer / num_layers - midpoint)) for layer in range(num_layers + 1)
    )
    # differences of 1 / (1 + u), cleared of fractions: two that are both near 1 keep their digits
    shares = ((last - u) * (1 + first) / ((last - first) * (1 + u)) for u in inner)
    return (1.0, *(min(1.0, share * (1 - floor) + floor) for share in shares))


def solve_sigmoid(
    steepness: float,
    floor: float,
    num_layers: int,
    cost: Callable[[Sequence[float]], float],
    target: float,
) -> tuple[float, float]:
    """Solve for midpoint and floor that cost what is asked; the floor rises where it must.

    Args:
        steepness: a.
        floor: The least one.
        num_layers: L.
        cost: Of ratios; growing with each of them.
        target: In the unit of `cost`.

    Raises:
        BudgetError: The lowest midpoint still costs more; or the whole image costs less.
    """

    def of(midpoint: float, least: float) -> float:
        return cost(sigmoid_ratios(steepness, midpoint, least, num_layers))

    low, high = _MIDPOINTS
    if (cheapest := of(low, floor)) > target:
        raise BudgetError(
            f"a sigmoid of steepness {steepness:g} and floor {floor:g} over {num_layers} layers "
            f"costs at least {cheapest:.3f}, the budget is {target:.3f}: ask for more, or for a "
            "steeper one"
        )
    if (whole := of(high, 1.0)) < target - 1e-9:
        raise BudgetError(f"a budget of {target:.3f} is more than all tokens cost, {whole:.3f}")
    if of(high, floor) >= target:
        return _bisect(lambda x: of(x, floor), low, high, target), floor
    return high, _bisect(lambda x: of(high, x), floor, 1.0, target)


def _bisect(f: Callable[[float], float], low: float, high: float, target: float) -> float:
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) < target else (low, middle)
    return high


def mean_ratio(ratios: Sequence[float]) -> float:
    """Average over decoder layers."""
    return math.fsum(ratios) / len(ratios)


@cache
def bundle(ratios: tuple[float, ...]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Choose at most 8 placements, each with the mean of the ratios it stands for.

    Of all ways to cut the layers behind the first into runs, the one with the smallest squared
    distance from the ratios; as many runs as drop at least 1 % of the tokens each.

    Args:
        ratios: Not growing; the first is 1.

    Returns:
        Layers (ascending, from 1) and what enters them; the mean over layers is unchanged.
    """
    for stages in range(min(STAGES, len(ratios) - 1), 0, -1):
        starts = _cut(ratios[1:], stages)
        ends = [*starts[1:], len(ratios) - 1]
        means = [
            math.fsum(ratios[1 + a : 1 + b]) / (b - a) for a, b in zip(starts, ends, strict=True)
        ]
        drops = [a - b for a, b in zip([1.0, *means[:-1]], means, strict=True)]
        if stages == 1 or min(drops) >= LEAST_CHANGE:
            break
    return tuple(1 + start for start in starts), tuple(means)


def _cut(ratios: Sequence[float], runs: int) -> list[int]:
    """Find the starts of the runs that fit best (dynamic programming over prefixes)."""
    n = len(ratios)
    sums, squares = [0.0], [0.0]
    for ratio in ratios:
        sums.append(sums[-1] + ratio)
        squares.append(squares[-1] + ratio * ratio)

    def error(a: int, b: int) -> float:
        return squares[b] - squares[a] - (sums[b] - sums[a]) ** 2 / (b - a)

    best = [(error(0, b), [0]) if b else (math.inf, [0]) for b in range(n + 1)]
    for run in range(1, runs):
        best = [
            min(
                ((best[a][0] + error(a, b), [*best[a][1], a]) for a in range(run, b)),
                default=(math.inf, [0]),
            )
            for b in range(n + 1)
        ]
    return best[n][1]
