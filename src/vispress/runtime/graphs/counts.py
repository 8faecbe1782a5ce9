"""Tell what ran from graphs, and what did not and why: plain data."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class CaptureReport:
    """What a captured model has run.

    Args:
        graphs: Graphs that are held.
        recorded: Graphs that were recorded.
        evicted: Graphs that had to go, because there were more than are held.
        prefills: Prefills that ran from one.
        steps: Decode steps that ran from one.
        fallbacks: Calls that ran as they would have, by the reason.
        exact: Prefills whose graphs are of their length alone, by the reason.
    """

    graphs: int
    recorded: int
    evicted: int
    prefills: int
    steps: int
    fallbacks: Mapping[str, int]
    exact: Mapping[str, int]

    def __str__(self) -> str:
        lines = [
            f"{self.prefills} prefills and {self.steps} decode steps ran from {self.graphs} graphs "
            f"({self.recorded} recorded, {self.evicted} evicted)"
        ]
        lines += [f"{count} calls ran without: {why}" for why, count in self.fallbacks.items()]
        lines += [f"{n} prefills ran by their exact length: {why}" for why, n in self.exact.items()]
        return "\n".join(lines)
