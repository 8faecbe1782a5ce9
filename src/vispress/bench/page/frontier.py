"""Frontier plots: accuracy against what it costs, one overview and one small panel a method."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vispress.bench.page.axes import Axis, by_group, references, x_scale, y_scale
from vispress.bench.page.geometry import MARKERS, Scale, number, path, spread
from vispress.bench.page.results import Results
from vispress.bench.page.words import TIMES, accuracy, budget, interval
from vispress.bench.results.compare import ORACLE
from vispress.bench.results.stats import Interval
from vispress.bench.results.summary import Row

HIGHLIGHTED = len(MARKERS)
COLOUR_RULE = (
    f"up to {HIGHLIGHTED} methods that are better than random, at most budgets first, then those "
    "that fewest others beat (corrected tests), then by the order of the plan"
)
_LABEL_GAP = 17.0


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
    references: Sequence[tuple[str, str, str]] = ()
    below: Sequence[str] = ()


def highlighted(results: Results) -> dict[str, int]:
    """Choose the methods that get a colour, with their slots: all of a small plan's.

    Of more than there are colours, those that `COLOUR_RULE` says.
    """
    if len(shown := _methods(results)) <= HIGHLIGHTED:
        return {name: slot for slot, name in enumerate(shown)}
    better: dict[str, int] = {}
    for test in results.summary.comparisons:
        if test.against == "random" and test.significant and test.difference.mean > 0:
            better[test.group] = better.get(test.group, 0) + 1
    certain = [place for ranking in results.summary.rankings for place in ranking.places]
    beaten = {name: sum(p.first - 1 for p in certain if p.group == name) for name in better}
    order = [name for name in results.groups if name in better]
    # a stable sort: what is equal stays in the order of the plan
    order.sort(key=lambda name: (-better[name], beaten[name]))
    chosen = set(order[:HIGHLIGHTED])
    return {name: i for i, name in enumerate(n for n in results.groups if n in chosen)}


def colour_rule(results: Results) -> str:
    """Say which methods get a colour."""
    return "all methods" if len(_methods(results)) <= HIGHLIGHTED else COLOUR_RULE


def _methods(results: Results) -> list[str]:
    return [name for name in results.groups if name not in results.controls]


def overview(results: Results, axis: Axis, *, wide: bool) -> Plot | None:
    """Plot all methods in one; None where nothing was measured on this axis.

    Args:
        results: A folder.
        axis: What it is drawn against.
        wide: For a window of 700 pixels or more; the other one has its labels in the legend.
    """
    groups = by_group(results, axis)
    if not groups:
        return None
    width, height = (1040, 540) if wide else (380, 400)
    left, right = 52.0, width - (184.0 if wide else 12.0)
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


def whisker(x: float, score: Interval, y: Scale) -> str:
    """Draw the interval of a score as a vertical line, as path data."""
    return f"M{number(x)} {number(y(score.low))}V{number(y(score.high))}"


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
        value, score = axis.at(row), accuracy(row)
        at = (x(value), y(score.mean))
        points.append(at)
        lines = ""
        if whiskers:
            lines = whisker(at[0], score, y)
            if (across := axis.ends(row)) is not None:
                lines += f"M{number(x(across[0]))} {number(at[1])}H{number(x(across[1]))}"
        shown = f"{value:.2f}{TIMES}" if not axis.log else f"{value:.1f} tokens"
        title = f"{name}{budget(row, ', asked ')}: {interval(score)}, {shown}"
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
    """Place the names of what is not plain beside the right ends of lines, none over another."""
    named = [line for line in series if line.kind != "plain"]
    ends = [(line.marks[-1].x, line.marks[-1].y, line.name, line.kind, line.slot) for line in named]
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
