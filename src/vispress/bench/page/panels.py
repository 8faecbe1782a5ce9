"""Small multiples: a panel a method, all others grey behind it."""

from collections.abc import Sequence
from dataclasses import dataclass

from vispress.bench.page.axes import AXES, by_group, references, x_scale, y_scale
from vispress.bench.page.frontier import Mark, whisker
from vispress.bench.page.geometry import number, path
from vispress.bench.page.results import Results
from vispress.bench.page.words import accuracy, counted, interval

WIDTH, HEIGHT = 232, 168
_LEFT, _RIGHT, _TOP, _BOTTOM = 28.0, 226.0, 8.0, 142.0


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One method in front of the others."""

    name: str
    control: bool
    verdict: str
    line: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True, kw_only=True)
class Panels:
    """All panels, and what is the same in each."""

    width: int
    height: int
    left: float
    right: float
    top: float
    bottom: float
    xticks: Sequence[tuple[str, str]]
    yticks: Sequence[tuple[str, str]]
    others: str
    random: str
    base: str | None
    panels: Sequence[Panel]


def panels(results: Results) -> Panels | None:
    """Make a panel for every method and control; None where nothing is finished."""
    axis = AXES[0]
    groups = by_group(results, axis)
    if not groups:
        return None
    x, xticks = x_scale(results, groups, axis, _LEFT, _RIGHT, most=4)
    y, yticks = y_scale(groups, _TOP, _BOTTOM, most=4)
    lines, drawn = {}, []
    for name, rows in groups.items():
        at = [(x(axis.at(row)), y(accuracy(row).mean)) for row in rows]
        lines[name] = path(at)
        marks = []
        for (px, py), row in zip(at, rows, strict=True):
            value = accuracy(row)
            whiskers = whisker(px, value, y)
            title = f"{axis.at(row):.1f} tokens: {interval(value)}"
            marks.append(Mark(x=number(px), y=number(py), whiskers=whiskers, title=title))
        drawn.append(
            Panel(
                name=name,
                control=name in results.controls,
                verdict=_verdict(results, name),
                line=lines[name],
                marks=tuple(marks),
            )
        )
    bases = [place for place, _, kind in references(results, y)[0] if kind == "base"]
    return Panels(
        width=WIDTH,
        height=HEIGHT,
        left=_LEFT,
        right=_RIGHT,
        top=_TOP,
        bottom=_BOTTOM,
        xticks=xticks,
        yticks=yticks,
        others="".join(lines.values()),
        random=lines.get("random", ""),
        base=bases[0] if bases else None,
        panels=drawn,
    )


def _verdict(results: Results, name: str) -> str:
    """Count the budgets at which a method differs from random, in words."""
    if name in results.controls:
        return "control"
    tests = [c for c in results.summary.comparisons if c.group == name and c.against == "random"]
    if not tests:
        return "not compared with random"
    better = sum(c.significant and c.difference.mean > 0 for c in tests)
    worse = sum(c.significant and c.difference.mean < 0 for c in tests)
    where = f"of {counted(len(tests), 'budget')}"
    parts = [f"better at {better}"] * bool(better) + [f"worse at {worse}"] * bool(worse)
    return f"{', '.join(parts)} {where}" if parts else f"as random at all {where[3:]}"
