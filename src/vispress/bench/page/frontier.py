"""Frontier plots: accuracy against what it costs, one overview and one small panel a method."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from vispress.bench.page.geometry import MARKERS, Scale, nice_ticks, number, path, spread
from vispress.bench.page.results import ORACLE, Results
from vispress.bench.page.words import accuracy, budget, percent
from vispress.bench.summary import BLIND, Row

HIGHLIGHTED = len(MARKERS)
_LABEL_GAP = 17.0


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What a frontier is drawn against.

    Args:
        name: Of the tab.
        label: Under the axis.
        value: Of a row; None where it was not measured.
        spread: Whiskers, low and high.
        log: Whether each doubling takes the same room.
    """

    name: str
    label: str
    value: Callable[[Row], float | None]
    spread: Callable[[Row], tuple[float, float] | None] = lambda _: None
    log: bool = True


AXES = (
    Axis(
        name="kept, mean over layers",
        label="visual tokens of an image kept, mean over decoder layers (log scale)",
        value=lambda row: row.kept_mean,
    ),
    Axis(
        name="kept at the end",
        label="visual tokens of an image kept at the last decoder layer (log scale)",
        value=lambda row: row.kept_end,
    ),
    Axis(
        name="prefill time",
        label="prefill time over the uncompressed model's (language model, measured in turns)",
        value=lambda row: row.cost and row.cost.prefill_ratio.median,
        spread=lambda row: row.cost and (row.cost.prefill_ratio.p20, row.cost.prefill_ratio.p80),
        log=False,
    ),
    Axis(
        name="time to first token",
        label="time from pixels to the first token over the uncompressed model's",
        value=lambda row: row.cost and row.cost.ttft_ratio.median,
        spread=lambda row: row.cost and (row.cost.ttft_ratio.p20, row.cost.ttft_ratio.p80),
        log=False,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One result: where it stands, its whiskers as path data, and its tooltip."""

    x: str
    y: str
    whiskers: str
    title: str


@dataclass(frozen=True, kw_only=True)
class Series:
    """One group.

    Args:
        name: As in the tables.
        kind: `"plain"`, `"control"`, `"bound"` or `"highlight"`.
        slot: Colour and marker of a highlighted one.
        line: Path data.
        marks: Its results, least kept first.
    """

    name: str
    kind: str
    slot: int
    line: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True, kw_only=True)
class Label:
    """A name beside the plot, with a leader from the end of its line."""

    text: str
    kind: str
    slot: int
    x: str
    y: str
    leader: str


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Everything the template draws, in pixels."""

    width: int
    height: int
    left: float
    right: float
    top: float
    bottom: float
    title: str
    xlabel: str = ""
    xticks: Sequence[tuple[str, str]] = ()
    yticks: Sequence[tuple[str, str]] = ()
    series: Sequence[Series] = ()
    labels: Sequence[Label] = ()
    references: Sequence[tuple[str, str, str]] = field(default=())
    below: Sequence[str] = ()


def highlighted(results: Results) -> dict[str, int]:
    """Methods that get a colour: those that differ from random, at most budgets first.

    Ties go by the order of the plan, never by accuracy: a place in the list is no ranking.
    """
    beats: dict[str, list[int]] = {}
    for found in results.summary.comparisons:
        if found.against == "random" and found.significant:
            better = found.difference.mean > 0
            counts = beats.setdefault(found.group, [0, 0])
            counts[0 if better else 1] += 1
    order = [name for name in results.groups if name in beats]
    order.sort(key=lambda name: (-beats[name][0], -beats[name][1]))
    chosen = set(order[:HIGHLIGHTED])
    return {name: i for i, name in enumerate(n for n in results.groups if n in chosen)}


def by_group(results: Results, axis: Axis) -> dict[str, list[Row]]:
    """Rows with a place on the axis, least first; baseline and blind control left out."""
    groups: dict[str, list[Row]] = {}
    for row in results.summary.rows:
        shown = row.accuracy is not None and not row.uncompressed and row.group != BLIND
        if shown and axis.value(row) is not None:
            groups.setdefault(row.group, []).append(row)
    for rows in groups.values():
        rows.sort(key=lambda row: axis.value(row) or 0.0)
    return groups


def overview(results: Results, axis: Axis, *, wide: bool) -> Plot | None:
    """All methods in one plot; None where nothing was measured on this axis.

    Args:
        results: A folder.
        axis: What it is drawn against.
        wide: For a window of 700 pixels or more; the other one has its labels in the legend.
    """
    groups = by_group(results, axis)
    if not groups:
        return None
    width, height = (880, 480) if wide else (380, 400)
    left, right = 52.0, width - (176.0 if wide else 12.0)
    top, bottom = 14.0, height - 48.0
    x, xticks = x_scale(results, groups, axis, left, right, most=9 if wide else 5)
    y, yticks = y_scale(groups, top, bottom, most=8)
    slots = highlighted(results)
    series = [
        _series(results, name, rows, axis, (x, y), slots, whiskers=name in slots)
        for name, rows in groups.items()
    ]
    # the highlighted are drawn last, on top
    order = {"plain": 0, "control": 1, "bound": 2, "highlight": 3}
    series.sort(key=lambda one: order[one.kind])
    lines, below = references(results, y)
    return Plot(
        width=width,
        height=height,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        title=f"Accuracy against {axis.name}, {len(series)} methods and controls",
        xlabel=axis.label if wide else axis.name + (" (log scale)" if axis.log else ""),
        xticks=xticks,
        yticks=yticks,
        series=series,
        labels=_labels(series, lines, right, top, bottom) if wide else (),
        references=lines,
        below=below,
    )


def x_scale(
    results: Results,
    groups: Mapping[str, Sequence[Row]],
    axis: Axis,
    left: float,
    right: float,
    *,
    most: int,
) -> tuple[Scale, list[tuple[str, str]]]:
    """Scale and ticks: the budgets asked for where tokens are counted, round values elsewhere."""
    values = [axis.value(row) or 0.0 for rows in groups.values() for row in rows]
    if not axis.log:
        ends = [end for rows in groups.values() for row in rows for end in axis.spread(row) or ()]
        low, high = min([*values, *ends]), max([*values, *ends, 1.0])
        margin = 0.04 * (high - low or 1.0)
        scale = Scale(low=low - margin, high=high + margin, start=left + 6, end=right - 6)
        ticks = nice_ticks(scale.low, scale.high, most)
        return scale, [(number(scale(t)), f"{t:g}×") for t in ticks]
    positive = [v for v in values if v > 0] or [1.0]
    low, high = min(positive), max(positive)
    low = low / 1.6 if 0.0 in values else low / 1.12
    start = left + 10
    scale = Scale(low=low, high=max(high, low * 2) * 1.12, start=start, end=right - 6, log=True)
    visual = fmean(row.visual_tokens for rows in groups.values() for row in rows)
    asked = sorted(ratio * visual for ratio in results.keep_ratios)
    asked = [t for t in asked if scale.low <= t <= scale.high] or [low, high]
    step = -(-len(asked) // most)
    found = [(number(scale(t)), f"{t:.0f}") for t in asked[::step]]
    return scale, ([(number(start), "0")] if 0.0 in values else []) + found


def y_scale(
    groups: Mapping[str, Sequence[Row]], top: float, bottom: float, *, most: int
) -> tuple[Scale, list[tuple[str, str]]]:
    """From the lowest interval, rounded down to a tenth, to 100 %."""
    lowest = min(accuracy(row).low for rows in groups.values() for row in rows)
    low = min(0.9, int(lowest * 10) / 10)
    scale = Scale(low=low, high=1.0, start=bottom, end=top)
    return scale, [(number(scale(t)), f"{100 * t:g}") for t in nice_ticks(low, 1.0, most)]


def references(results: Results, y: Scale) -> tuple[list[tuple[str, str, str]], list[str]]:
    """Lines across the plot (place, name, kind), and those that lie below its range, in words."""
    found: list[tuple[float, str, str]] = []
    for group, name, kind in (("none", "uncompressed", "base"), (BLIND, "no image", "floor")):
        if (row := results.summary.find(group)) is not None:
            found.append((accuracy(row).mean, name, kind))
    found.append((fmean(results.summary.chance.values()), "best constant answer", "floor"))
    lines = [(number(y(v)), f"{name} {percent(v)}", kind) for v, name, kind in found if v >= y.low]
    return lines, [f"{name} {percent(v)} %" for v, name, _ in found if v < y.low]


def _series(
    results: Results,
    name: str,
    rows: Sequence[Row],
    axis: Axis,
    scales: tuple[Scale, Scale],
    slots: Mapping[str, int],
    *,
    whiskers: bool,
) -> Series:
    x, y = scales
    points, marks = [], []
    for row in rows:
        value, found = axis.value(row) or 0.0, accuracy(row)
        at = (x(value), y(found.mean))
        points.append(at)
        lines = ""
        if whiskers:
            lines = f"M{number(at[0])} {number(y(found.low))}V{number(y(found.high))}"
            if (across := axis.spread(row)) is not None:
                lines += f"M{number(x(across[0]))} {number(at[1])}H{number(x(across[1]))}"
        shown = f"{value:.2f}×" if not axis.log else f"{value:.1f} tokens"
        title = (
            f"{name}{budget(row, ', asked ')}: {percent(found.mean)} % "
            f"({percent(found.low)} to {percent(found.high)}), {shown}"
        )
        marks.append(Mark(x=number(at[0]), y=number(at[1]), whiskers=lines, title=title))
    slot = slots.get(name, -1)
    kind = "highlight" if slot >= 0 else "control" if name in results.controls else "plain"
    if name == ORACLE:
        kind = "bound"
    return Series(name=name, kind=kind, slot=slot, line=path(points), marks=tuple(marks))


def _labels(
    series: Sequence[Series],
    lines: Sequence[tuple[str, str, str]],
    right: float,
    top: float,
    bottom: float,
) -> list[Label]:
    """Names of what is not plain, beside the right end of its line, none over another."""
    named = [one for one in series if one.kind != "plain"]
    ends = [(one.marks[-1].x, one.marks[-1].y, one.name, one.kind, one.slot) for one in named]
    ends += [(number(right), y, name, kind, -1) for y, name, kind in lines]
    places = spread([float(y) for _, y, *_ in ends], _LABEL_GAP, top + 4, bottom - 2)
    return [
        Label(
            text=text,
            kind=kind,
            slot=slot,
            x=number(right + 22),
            y=number(place),
            leader=f"M{x} {y}L{number(right + 4)} {y}L{number(right + 18)} {number(place)}",
        )
        for (x, y, text, kind, slot), place in zip(ends, places, strict=True)
    ]
