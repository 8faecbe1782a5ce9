"""Axes of the frontiers, and the scales that all plots of a page share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from vispress.bench.page.geometry import Scale, nice_ticks, number
from vispress.bench.page.results import Results
from vispress.bench.page.words import TIMES, accuracy, percent
from vispress.bench.results.cost_rows import Cost
from vispress.bench.results.stats import Quantiles
from vispress.bench.results.summary import BLIND, Row


@dataclass(frozen=True, kw_only=True)
class Axis:
    """An axis of a frontier: tokens kept, or a measured time.

    Args:
        name: Of the tab.
        label: Under the axis.
        kept: Tokens of a row; each doubling takes the same room.
        timed: Time of a row over the uncompressed model's.
    """

    name: str
    label: str
    kept: Callable[[Row], float] | None = None
    timed: Callable[[Cost], Quantiles] | None = None

    @property
    def log(self) -> bool:
        """Whether the scale is logarithmic."""
        return self.kept is not None

    def value(self, row: Row) -> float | None:
        """Find the place of a row, None where it was not measured."""
        if self.kept is not None:
            return self.kept(row)
        return None if (spread := self._spread(row)) is None else spread.median

    def at(self, row: Row) -> float:
        """Find the place of a row that has one."""
        value = self.value(row)
        assert value is not None  # `by_group` leaves others out
        return value

    def ends(self, row: Row) -> tuple[float, float] | None:
        """Find p20 and p80 of a time; None for tokens, which are counted."""
        return None if (spread := self._spread(row)) is None else (spread.p20, spread.p80)

    def _spread(self, row: Row) -> Quantiles | None:
        return None if self.timed is None or row.cost is None else self.timed(row.cost)


AXES = (
    Axis(
        name="kept, mean over layers",
        label="visual tokens of an image kept, mean over decoder layers (log scale)",
        kept=lambda row: row.kept_mean,
    ),
    Axis(
        name="kept at the end",
        label="visual tokens of an image kept at the last decoder layer (log scale)",
        kept=lambda row: row.kept_end,
    ),
    Axis(
        name="prefill time",
        label="prefill time over the uncompressed model's (language model, measured in turns)",
        timed=lambda cost: cost.prefill_ratio,
    ),
    Axis(
        name="time to first token",
        label="time from pixels to the first token over the uncompressed model's",
        timed=lambda cost: cost.ttft_ratio,
    ),
)


def by_group(results: Results, axis: Axis) -> dict[str, list[Row]]:
    """Group the rows with a place on the axis, least first, without baseline and blind control."""
    groups: dict[str, list[Row]] = {}
    for row in results.summary.rows:
        shown = row.accuracy is not None and not row.uncompressed and row.group != BLIND
        if shown and axis.value(row) is not None:
            groups.setdefault(row.group, []).append(row)
    for rows in groups.values():
        rows.sort(key=axis.at)
    return groups


def x_scale(
    results: Results,
    groups: Mapping[str, Sequence[Row]],
    axis: Axis,
    left: float,
    right: float,
    *,
    most: int,
) -> tuple[Scale, list[tuple[str, str]]]:
    """Make scale and ticks: the budgets asked for where tokens are counted, else round values."""
    values = [axis.at(row) for rows in groups.values() for row in rows]
    if not axis.log:
        ends = [end for rows in groups.values() for row in rows for end in axis.ends(row) or ()]
        low, high = min([*values, *ends]), max([*values, *ends, 1.0])
        margin = 0.04 * (high - low or 1.0)
        scale = Scale(low=low - margin, high=high + margin, start=left + 6, end=right - 6)
        ticks = nice_ticks(scale.low, scale.high, most)
        return scale, [(number(scale(t)), f"{t:g}{TIMES}") for t in ticks]
    positive = [v for v in values if v > 0] or [1.0]
    low, high = min(positive), max(positive)
    low = low / 1.6 if 0.0 in values else low / 1.12
    start = left + 10
    scale = Scale(low=low, high=max(high, low * 2) * 1.12, start=start, end=right - 6, log=True)
    visual = fmean(row.visual_tokens for rows in groups.values() for row in rows)
    asked = sorted(ratio * visual for ratio in results.keep_ratios)
    asked = [t for t in asked if scale.low <= t <= scale.high] or [low, high]
    step = -(-len(asked) // most)
    labelled = [(number(scale(t)), f"{t:.0f}") for t in asked[::step]]
    return scale, ([(number(start), "0")] if 0.0 in values else []) + labelled


def y_scale(
    groups: Mapping[str, Sequence[Row]], top: float, bottom: float, *, most: int
) -> tuple[Scale, list[tuple[str, str]]]:
    """Make the scale of accuracy, from the lowest interval (rounded down to a tenth) to 100 %."""
    lowest = min(accuracy(row).low for rows in groups.values() for row in rows)
    low = min(0.9, int(lowest * 10) / 10)
    scale = Scale(low=low, high=1.0, start=bottom, end=top)
    return scale, [(number(scale(t)), f"{100 * t:g}") for t in nice_ticks(low, 1.0, most)]


def references(results: Results, y: Scale) -> tuple[list[tuple[str, str, str]], list[str]]:
    """List the lines across the plot (place, name, kind), and in words those below its range."""
    levels: list[tuple[float, str, str]] = []
    for group, name, kind in (("none", "uncompressed", "base"), (BLIND, "no image", "floor")):
        if (row := results.summary.find(group)) is not None:
            levels.append((accuracy(row).mean, name, kind))
    levels.append((fmean(results.summary.chance.values()), "best constant answer", "floor"))
    lines = [(number(y(v)), f"{name} {percent(v)}", kind) for v, name, kind in levels if v >= y.low]
    return lines, [f"{name} {percent(v)} %" for v, name, _ in levels if v < y.low]
