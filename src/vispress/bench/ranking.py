"""Which places in a ranking are certain: all pairs tested at equal budget, ties said to be ties."""

from dataclasses import dataclass


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
    """All methods and controls at one keep ratio, best mean accuracy first.

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
