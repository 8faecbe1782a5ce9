"""The heat map: methods x tasks at one budget, accuracy and difference from random."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from vispress.bench.page.results import Results
from vispress.bench.page.words import bounds, name_of, points
from vispress.bench.plan.cells import UNCOMPRESSED
from vispress.bench.plan.controls import RANDOM
from vispress.bench.results.compare import per_question
from vispress.bench.results.summary import BLIND, Row

_FULL = 0.4  # a difference of 40 points has the full colour
_WIDE = 1.96


@dataclass(frozen=True, kw_only=True)
class HeatCell:
    """One accuracy.

    Args:
        value: In percent, as printed.
        shade: Of the accuracy, 0 to 100.
        gap: Difference from random in points, as printed; empty where there is none.
        gap_shade: Of its size, 0 to 100.
        side: `"up"`, `"down"` or `""`.
        noise: Whether the difference is within what chance alone gives this pair of cells.
        title: The interval.
    """

    value: str
    shade: int
    gap: str = ""
    gap_shade: int = 0
    side: str = ""
    noise: bool = True
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class HeatRow:
    """A method over all tasks, their mean last."""

    name: str
    kind: str
    cells: tuple[HeatCell, ...]


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """One budget."""

    budget: str
    tasks: tuple[str, ...]
    rows: tuple[HeatRow, ...]
    refused: tuple[str, ...]
    compared: bool


def heat_maps(results: Results) -> list[HeatMap]:
    """Make one map a budget, largest first, then one for methods with a budget of their own."""
    asked: list[float | None] = [*results.keep_ratios, None]
    scores = _scores(results)
    maps = [_map(results, keep_ratio, scores) for keep_ratio in asked]
    references = {UNCOMPRESSED, BLIND}
    return [m for m in maps if any(row.kind not in references for row in m.rows)]


def _scores(results: Results) -> dict[tuple[str, float | None], dict[str, list[float]]]:
    """Compute the share of seeds that were right, by group, budget, task and question."""
    cells: dict[tuple[str, float | None], list[Mapping[str, Any]]] = {}
    for cell in results.answered:
        cells.setdefault((cell["cell"]["group"], cell["cell"]["keep_ratio"]), []).append(cell)
    return {key: per_question(seeds) for key, seeds in cells.items()}


def _map(
    results: Results,
    keep_ratio: float | None,
    scores: Mapping[tuple[str, float | None], Mapping[str, Sequence[float]]],
) -> HeatMap:
    tasks = tuple(results.summary.chance)
    random = scores.get((RANDOM, keep_ratio))
    rows, refused = [], []
    for row in results.summary.rows:
        reference = row.group in (UNCOMPRESSED, BLIND)
        if not reference and row.keep_ratio != keep_ratio:
            continue
        if row.tasks is None:
            refused.append(row.group)
            continue
        by_task = scores[row.group, row.keep_ratio]
        cells = [_cell(row, task, by_task, random) for task in tasks]
        # plain words for the template's classes
        kind = "control" if row.group in results.controls else "method"
        kind = row.group if reference else kind
        rows.append(
            HeatRow(
                name=name_of(row.group),
                kind=kind,
                cells=(*cells, _mean(cells, row, by_task, random)),
            )
        )
    return HeatMap(
        budget="own budget" if keep_ratio is None else f"{keep_ratio:g}",
        tasks=tasks,
        rows=tuple(rows),
        refused=tuple(refused),
        compared=random is not None,
    )


def _cell(
    row: Row,
    task: str,
    by_task: Mapping[str, Sequence[float]],
    random: Mapping[str, Sequence[float]] | None,
) -> HeatCell:
    assert row.tasks is not None  # `_map` leaves others out
    value = row.tasks[task]
    gaps = None if random is None else [_minus(by_task[task], random[task])]
    return _shaded(value.mean, bounds(value), gaps)


def _mean(
    cells: Sequence[HeatCell],
    row: Row,
    by_task: Mapping[str, Sequence[float]],
    random: Mapping[str, Sequence[float]] | None,
) -> HeatCell:
    value = row.accuracy
    assert value is not None  # `_map` leaves others out
    gaps = None if random is None else [_minus(by_task[task], random[task]) for task in by_task]
    return _shaded(value.mean, bounds(value), gaps)


def _shaded(mean: float, interval: str, gaps: list[list[float]] | None) -> HeatCell:
    shade = round(100 * mean)
    if gaps is None:
        return HeatCell(value=f"{100 * mean:.0f}", shade=shade, title=interval)
    gap = fmean(map(fmean, gaps))
    error = _WIDE * sqrt(sum(_variance(g) for g in gaps)) / len(gaps)
    return HeatCell(
        value=f"{100 * mean:.0f}",
        shade=shade,
        gap=points(gap).removesuffix(".0") if abs(gap) >= 1 else f"{points(gap)[:-2] or '0'}",
        gap_shade=round(100 * min(1.0, abs(gap) / _FULL)),
        side="up" if gap > 0 else "down" if gap < 0 else "",
        noise=abs(gap) <= error or gap == 0,
        title=f"{interval}; random {points(-gap)}",
    )


def _variance(gaps: Sequence[float]) -> float:
    """Compute the variance of the mean of paired differences."""
    return stdev(gaps) ** 2 / len(gaps) if len(gaps) > 1 else 1.0


def _minus(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(first, second, strict=True)]
