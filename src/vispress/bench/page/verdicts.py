"""Verdicts of the tests: sentences on top, their table, certain places."""

from dataclasses import dataclass

from vispress.bench.page.geometry import nice_ticks
from vispress.bench.page.results import Results
from vispress.bench.page.words import listed, p_value, points, ratio
from vispress.bench.plan.controls import RANDOM
from vispress.bench.results.compare import Against, Comparison


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Verdicts at one budget."""

    budget: str
    better: tuple[str, ...]
    worse: tuple[str, ...]
    equal: tuple[str, ...]
    beats_controls: tuple[str, ...]
    best_control: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One comparison; `low`, `mid` and `high` place its interval in per cent of the cell."""

    difference: str
    interval: str
    p: str
    verdict: str
    low: float
    mid: float
    high: float
    sort: float


@dataclass(frozen=True, kw_only=True)
class VerdictTable:
    """All methods against one kind of control.

    Args:
        against: Whom.
        columns: Budget, and the control met there.
        rows: Method, and its test at each budget (None where there is none).
        scale: Points at the ends of every interval's strip.
        ticks: Places in per cent of a strip, and their values.
    """

    against: str
    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, tuple[Verdict | None, ...]], ...]
    scale: str


def findings(results: Results) -> list[Finding]:
    """Write, for each budget, which methods differ from random and which beat every control."""
    verdicts = []
    for keep_ratio in results.keep_ratios:
        tests = [c for c in results.summary.comparisons if c.keep_ratio == keep_ratio]
        random = [c for c in tests if c.against == "random"]
        if not random:
            continue
        best = [c for c in tests if c.against == "best control"]
        # random is the best control where no other one is named
        winners = best or random
        verdicts.append(
            Finding(
                budget=ratio(keep_ratio),
                better=tuple(c.group for c in random if _verdict(c) == "better"),
                worse=tuple(c.group for c in random if _verdict(c) == "worse"),
                equal=tuple(c.group for c in random if _verdict(c) == "equal"),
                beats_controls=tuple(c.group for c in winners if _verdict(c) == "better"),
                best_control=winners[0].control,
            )
        )
    return verdicts


def verdict_tables(results: Results) -> list[VerdictTable]:
    """Make the two tables: against random, and against the best control of each budget."""
    kinds: tuple[Against, ...] = ("random", "best control")
    return [table for kind in kinds if (table := _verdict_table(results, kind)) is not None]


def _verdict_table(results: Results, against: Against) -> VerdictTable | None:
    tests = [c for c in results.summary.comparisons if c.against == against]
    if not tests:
        return None
    ends = [abs(end) for c in tests for end in (c.difference.low, c.difference.high)]
    reach = max(0.05, nice_ticks(0.0, max(*ends, 0.05) * 1.1, 4)[-1])
    reach = max(reach, max(ends))
    budgets = [r for r in results.keep_ratios if any(c.keep_ratio == r for c in tests)]
    by_place = {(c.group, c.keep_ratio): c for c in tests}
    controls = {c.keep_ratio: c.control for c in tests}
    groups = [name for name in results.groups if any(c.group == name for c in tests)]
    return VerdictTable(
        against="random" if against == RANDOM else "the best control",
        columns=tuple((ratio(b), controls[b]) for b in budgets),
        rows=tuple(
            (name, tuple(_place_verdict(by_place.get((name, b)), reach) for b in budgets))
            for name in groups
        ),
        scale=f"{100 * reach:.0f}",
    )


def _place_verdict(test: Comparison | None, reach: float) -> Verdict | None:
    if test is None:
        return None
    gap = test.difference
    low, mid, high = (50 + 50 * value / reach for value in (gap.low, gap.mean, gap.high))
    return Verdict(
        difference=points(gap.mean),
        interval=f"{points(gap.low)} to {points(gap.high)}",
        p=p_value(test.p_holm),
        verdict=_verdict(test),
        low=round(low, 1),
        mid=round(mid, 1),
        high=round(high, 1),
        sort=gap.mean,
    )


def _verdict(test: Comparison) -> str:
    if not test.significant:
        return "equal"
    return "better" if test.difference.mean > 0 else "worse"


@dataclass(frozen=True, kw_only=True)
class Places:
    """Certain places at one budget: (place or range, groups that share it)."""

    budget: str
    tied: bool
    places: tuple[tuple[str, str], ...]


def places(results: Results) -> list[Places]:
    """List places as far as they are certain; groups with the same range share a line."""
    lines = []
    for ranking in results.summary.rankings:
        ranges: dict[tuple[int, int], list[str]] = {}
        for place in ranking.places:
            ranges.setdefault((place.first, place.last), []).append(place.group)
        order = sorted(ranges)
        lines.append(
            Places(
                budget=ratio(ranking.keep_ratio),
                tied=ranking.tied,
                places=tuple(
                    (str(a) if a == b else f"{a} to {b}", listed(sorted(ranges[a, b])))
                    for a, b in order
                ),
            )
        )
    return lines
