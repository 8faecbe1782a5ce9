"""Means with bootstrap intervals; seeded, so a table made twice says the same."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
RESAMPLES = 2000


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
    """Mean of the strata's means, with a percentile bootstrap that resamples within each stratum.

    Where all scores are 0, or all are 1, a bootstrap has no spread; the exact binomial
    (Clopper-Pearson) bound of that many answers stands in for the missing end.

    Args:
        strata: Scores by question, one list a task; tasks weigh the same.
        seed: Of the resampling.
        resamples: How often.

    Raises:
        ValueError: A stratum is empty, or there is none.
    """
    if not strata or any(len(scores) == 0 for scores in strata):
        raise ValueError("bootstrap_mean needs at least one score in every stratum")
    arrays = [np.asarray(scores, dtype=np.float64) for scores in strata]
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


def _resampled(
    scores: NDArray[np.float64], rng: np.random.Generator, resamples: int
) -> NDArray[np.float64]:
    """Means of bootstrap samples, in blocks that keep memory small."""
    block = max(1, 2_000_000 // len(scores))
    means = [
        scores[rng.integers(0, len(scores), (min(block, resamples - start), len(scores)))].mean(1)
        for start in range(0, resamples, block)
    ]
    return np.concatenate(means)


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
    """p20, median and p80."""
    p20, median, p80 = (float(q) for q in np.quantile(values, (0.2, 0.5, 0.8)))
    return Quantiles(p20, median, p80)
