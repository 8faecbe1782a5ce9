"""Means with bootstrap intervals; seeded, so a table made twice says the same."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Strata = list[list[float]]
"""Scores by question, one list a task."""

CONFIDENCE = 0.95
LEVEL = 0.05
RESAMPLES = 2000
FLIPS = 9_999


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and where it probably lies.

    Args:
        mean: The estimate.
        low: Lower end of the 95 % interval.
        high: Upper end.
    """

    mean: float
    low: float
    high: float


def bootstrap_mean(
    strata: Sequence[Sequence[float]], *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Average the strata's means, with a percentile bootstrap within each stratum.

    Where all scores are 0, or all are 1, a bootstrap has no spread; the exact binomial
    (Clopper-Pearson) bound of that many answers stands in for the missing end.

    Args:
        strata: Scores by question, one list a task; tasks weigh the same.
        seed: Of the resampling.
        resamples: How often.

    Raises:
        ValueError: A stratum is empty, or there is none.
    """
    arrays = _arrays(strata)
    mean = float(np.mean([scores.mean() for scores in arrays]))
    rng = np.random.default_rng(seed)
    drawn = np.mean([_resampled(scores, rng, resamples) for scores in arrays], axis=0)
    tail = (1 - CONFIDENCE) / 2
    low, high = (float(q) for q in np.quantile(drawn, (tail, 1 - tail)))
    bound = tail ** (1 / sum(map(len, arrays)))
    if mean == 1.0:
        low = bound
    elif mean == 0.0:
        high = 1 - bound
    return Interval(mean, low, high)


def bootstrap_difference(
    strata: Sequence[Sequence[float]], *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Average paired differences in `[-1, 1]` over strata, with a bootstrap within each.

    Args:
        strata: Differences by question, one list a task.
        seed: Of the resampling.
        resamples: How often.

    Raises:
        ValueError: A stratum is empty, or there is none.
    """
    arrays = _arrays(strata)
    rng = np.random.default_rng(seed)
    drawn = np.mean([_resampled(gaps, rng, resamples) for gaps in arrays], axis=0)
    tail = (1 - CONFIDENCE) / 2
    low, high = (float(q) for q in np.quantile(drawn, (tail, 1 - tail)))
    return Interval(float(np.mean([gaps.mean() for gaps in arrays])), low, high)


def bootstrap_ratio(
    pairs: Sequence[Sequence[tuple[float, float]]], *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Divide two means over tasks, with a bootstrap that resamples both together.

    Args:
        pairs: Numerator and denominator by question, one list a task; the mean of the
            denominators must be clearly positive: resamples where it is not are left out.
        seed: Of the resampling.
        resamples: How often.

    Raises:
        ValueError: A stratum is empty, there is none, or the denominator is not positive.
    """
    arrays = _arrays(pairs)
    top, bottom = np.mean([both.mean(0) for both in arrays], axis=0)
    if bottom <= 0:
        raise ValueError(f"the denominator of a ratio must be positive, got a mean of {bottom}")
    rng = np.random.default_rng(seed)
    drawn = np.mean([_resampled(both, rng, resamples) for both in arrays], axis=0)
    drawn = drawn[drawn[:, 1] > 0]
    tail = (1 - CONFIDENCE) / 2
    low, high = (float(q) for q in np.quantile(drawn[:, 0] / drawn[:, 1], (tail, 1 - tail)))
    return Interval(float(top / bottom), low, high)


def sign_flip_test(
    strata: Sequence[Sequence[float]], *, seed: int = 0, flips: int = FLIPS
) -> float:
    """Test whether paired differences are centred on zero (two-sided p-value).

    Under the null hypothesis each question's difference is as likely with the other sign. The
    statistic is the mean over tasks of the mean difference, as the tables show it.

    Args:
        strata: Differences by question, one list a task.
        seed: Of the flips.
        flips: How many random sign patterns. Where none is as extreme, p is at most
            `1 / (flips + 1)`, and Hoeffding's bound where that is lower.

    Raises:
        ValueError: A stratum is empty, or there is none.
    """
    arrays = _arrays(strata)
    weighted = np.concatenate([gaps / (len(gaps) * len(arrays)) for gaps in arrays])
    observed = abs(weighted.sum())
    sizes = np.abs(weighted)
    if not (largest := sizes.max()):
        return 1.0
    # few sizes differ, and flips of equal ones add up to a binomial; 9 digits: no rounding noise
    levels, counts = np.unique((sizes / largest).round(9), return_counts=True)
    rng = np.random.default_rng(seed)
    ups = rng.binomial(counts, 0.5, (flips, len(counts)))
    sums = np.abs((2 * ups - counts) @ levels) * largest
    # sums in another order differ in their last bits: those are ties
    extreme = int((sums >= observed * (1 - 1e-9)).sum())
    if extreme:
        return (extreme + 1) / (flips + 1)
    bound = 2 * math.exp(-(observed**2) / (2 * float(sizes @ sizes)))
    return min(bound, 1 / (flips + 1))


def minus(first: Strata, second: Strata) -> Strata:
    """Subtract by question."""
    return [
        [a - b for a, b in zip(left, right, strict=True)]
        for left, right in zip(first, second, strict=True)
    ]


def holm(values: Sequence[float]) -> list[float]:
    """Correct p-values by Holm's step-down procedure, in the order given."""
    order = sorted(range(len(values)), key=values.__getitem__)
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = highest
    return adjusted


def _arrays(strata: Sequence[Sequence[Any]]) -> list[NDArray[np.float64]]:
    if not strata or any(len(scores) == 0 for scores in strata):
        raise ValueError("statistics need at least one score in every stratum")
    return [np.asarray(scores, dtype=np.float64) for scores in strata]


def _resampled(
    scores: NDArray[np.float64], rng: np.random.Generator, resamples: int
) -> NDArray[np.float64]:
    """Average bootstrap samples of `[n]` (or `[n, C]`) scores: `[resamples]` (or `[resamples, C]`).

    Few scores differ, so it is drawn how often each occurs: the same law, a hundred times faster.
    """
    values, counts = np.unique(scores, axis=0, return_counts=True)
    drawn = rng.multinomial(len(scores), counts / len(scores), resamples)
    means: NDArray[np.float64] = drawn @ values / len(scores)
    return means


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Median and spread of timings.

    Args:
        p20: 20 % of the values are below.
        median: Half of them are.
        p80: 80 % of them are.
    """

    p20: float
    median: float
    p80: float


def quantiles(values: Sequence[float]) -> Quantiles:
    """Compute p20, median and p80."""
    p20, median, p80 = (float(q) for q in np.quantile(values, (0.2, 0.5, 0.8)))
    return Quantiles(p20, median, p80)
