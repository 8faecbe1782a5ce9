"""Frontier plots: accuracy against visual tokens kept."""

import os
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any

from vispress.bench.results.files import ResultsError
from vispress.bench.results.stats import Interval
from vispress.bench.results.summary import BLIND, Row, Summary

_MARKERS = "osD^vPX*<>hp"
_BESIDE = 18
"""Entries of a legend that fit beside the plot."""


def write_plots(summary: Summary, folder: str | Path) -> list[Path]:
    """Draw `frontier.png` (mean over tasks) and `frontier-tasks.png` (one panel a task).

    Returns:
        The files.

    Raises:
        ResultsError: They cannot be written.
    """
    from matplotlib.figure import Figure

    folder = Path(folder)
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes = figure.add_subplot()
    _draw(axes, summary, None)
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) <= _BESIDE:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    else:  # a column beside the axes would leave the figure
        figure.set_size_inches(8, 5.2 + 0.2 * -(-len(labels) // 5))
        figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    tasks = list(summary.chance)
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    panels = Figure(figsize=(4 * columns, 3.1 * rows + 0.6), layout="constrained")
    for number, task in enumerate(tasks):
        _draw(panels.add_subplot(rows, columns, number + 1), summary, task)
    panels.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    return [
        save_figure(figure, folder / "frontier.png"),
        save_figure(panels, folder / "frontier-tasks.png"),
    ]


def save_figure(figure: Any, path: Path) -> Path:
    """Write a figure in one step.

    Raises:
        ResultsError: The file cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, dpi=150, format=path.suffix.lstrip(".") or "png")
        os.replace(temporary, path)  # noqa: PTH105  (the atomic one)
    except (OSError, ValueError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise ResultsError(f"cannot write {path}: {error}") from error
    return path


def _draw(axes: Any, summary: Summary, task: str | None) -> None:
    """Draw one panel; `task` None is the mean over tasks."""
    groups: dict[str, list[Row]] = {}
    for row in summary.rows:
        if row.accuracy is not None:
            groups.setdefault(row.group, []).append(row)
    for number, (group, rows) in enumerate(groups.items()):
        if rows[0].uncompressed or group == BLIND:
            continue
        rows = sorted(rows, key=lambda row: row.kept_mean)
        values = [_value(row, task) for row in rows]
        kept = [row.kept_mean for row in rows]
        color = f"C{number % 10}"
        axes.plot(
            kept,
            [v.mean for v in values],
            label=group,
            color=color,
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=4.5,
            linestyle="--" if rows[0].control else "-",
            linewidth=1.4,
        )
        low, high = [v.low for v in values], [v.high for v in values]
        axes.fill_between(kept, low, high, color=color, alpha=0.04 if task else 0.1, linewidth=0)
    _references(axes, summary, task)
    axes.set_xscale("log", base=2)
    asked = {r.keep_ratio * r.visual_tokens for r in summary.rows if r.accuracy and r.keep_ratio}
    if asked:
        axes.set_xticks(sorted(asked), [f"{count:.0f}" for count in sorted(asked)])
    axes.minorticks_off()
    axes.set_ylim(-0.02, 1.04)
    axes.set_xlabel("visual tokens kept" + ("" if task else " (mean over decoder layers)"))
    axes.set_ylabel("exact match")
    title = (
        task or f"mean of {len(summary.chance)} tasks, {summary.plan['questions']} questions each"
    )
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)


def _references(axes: Any, summary: Summary, task: str | None) -> None:
    """Draw horizontal lines: uncompressed, blind, and the best constant answer."""
    for group, name, style in (("none", "uncompressed", "-"), (BLIND, "no image", ":")):
        if (row := summary.find(group)) is not None:
            value = _value(row, task)
            axes.axhline(value.mean, color="black", linewidth=1, linestyle=style, label=name)
            axes.axhspan(value.low, value.high, color="black", alpha=0.06, linewidth=0)
    chance = fmean(summary.chance.values()) if task is None else summary.chance[task]
    axes.axhline(chance, color="gray", linewidth=0.8, linestyle="-.", label="constant answer")


def _value(row: Row, task: str | None) -> Interval:
    assert row.tasks is not None  # rows without results are filtered before
    assert row.accuracy is not None
    return row.accuracy if task is None else row.tasks[task]
