"""Certain places in a ranking: all pairs tested at equal budget, ties said to be ties."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from vispress.bench.results.stats import LEVEL, Strata, holm, minus, sign_flip_test


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one method or control stands at one keep ratio.

    Args:
        group: The method or control.
        accuracy: Mean over tasks.
        first: Best place it may have: one more than those that are significantly better.
        last: Worst place it may have: as many as there are, less those significantly worse.
        tier: From 1; all of a tier are significantly better than all of the tiers below.
    """

    group: str
    accuracy: float
    first: int
    last: int
    tier: int


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """All methods and controls at one keep ratio, best mean accuracy first, without the oracle.

    Args:
        keep_ratio: Of all of them.
        places: In order of mean accuracy, which says nothing within overlapping places.
    """

    keep_ratio: float
    places: tuple[Place, ...]

    @property
    def tied(self) -> bool:
        """Whether no pair differs significantly: then there is no order to print."""
        return all(place.first == 1 for place in self.places)


def rank(scores: Mapping[str, Strata], keep_ratio: float, *, seed: int = 0) -> Ranking:
    """Test every pair (paired sign flips, Holm over all pairs) and say which order is certain.

    Args:
        scores: Scores by question, one list a task, of each method and control.
        keep_ratio: Of all of them.
        seed: Of the tests.
    """
    accuracy = {name: fmean(map(fmean, tasks)) for name, tasks in scores.items()}
    order = sorted(scores, key=lambda name: -accuracy[name])
    pairs = list(combinations(order, 2))
    values = [sign_flip_test(minus(scores[a], scores[b]), seed=seed) for a, b in pairs]
    beaten = {pair for pair, p in zip(pairs, holm(values), strict=True) if p < LEVEL}
    places: list[Place] = []
    tier = 1
    for at, name in enumerate(order):
        if at and all((a, b) in beaten for a in order[:at] for b in order[at:]):
            tier += 1
        above = sum((other, name) in beaten for other in order)
        below = sum((name, other) in beaten for other in order)
        place = Place(
            group=name,
            accuracy=accuracy[name],
            first=1 + above,
            last=len(order) - below,
            tier=tier,
        )
        places.append(place)
    return Ranking(keep_ratio=keep_ratio, places=tuple(places))
