"""The page's tables as plain cells: results, cost, tasks. The template only lays them out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from vispress.bench.page.results import Results
from vispress.bench.page.words import (
    DASH,
    TIMES,
    bounds,
    name_of,
    percent,
    points,
    ratio,
    signed,
)
from vispress.bench.results.compare import ORACLE
from vispress.bench.results.cost_rows import Cost
from vispress.bench.results.stats import Interval, Quantiles
from vispress.bench.results.summary import BLIND, Row


@dataclass(frozen=True, kw_only=True)
class Field:
    """One table cell.

    Args:
        text: What it says; empty where nothing was measured.
        below: Interval or ratio, in small print.
        sort: What the column sorts by, where that is not the text.
    """

    text: str
    below: str = ""
    sort: float | None = None


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row of a table; `name` is its header, `first` whether a new method begins."""

    name: str
    kind: str
    first: bool
    fields: tuple[Field, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Columns (name, explanation) and lines."""

    columns: tuple[tuple[str, str], ...]
    lines: tuple[Line, ...]


Column = tuple[str, str, Callable[[Row], Field | None]]

_RESULTS: tuple[Column, ...] = (
    ("budget", "keep ratio that the plan asked for", lambda r: _budget(r)),
    ("kept, mean", "visual tokens of an image, mean over decoder layers", lambda r: _kept_mean(r)),
    ("kept at end", "visual tokens left at the last decoder layer", lambda r: _kept_end(r)),
    ("accuracy %", "mean over tasks, 95 % interval", lambda r: _share(r.accuracy)),
    ("loyalty %", "answers equal to the uncompressed model's", lambda r: _share(r.loyalty)),
    (
        "gap closed %",
        "of the gap between random (0) and the oracle (100), where that gap is significant",
        lambda r: _share(r.gap_closed),
    ),
    (
        "hard subset %",
        "accuracy on questions that the uncompressed model answers and down-sampling loses",
        lambda r: _hard(r),
    ),
    (
        "gain, points",
        "accuracy less that of the model without the picture",
        lambda r: _gap(r.mean_gain),
    ),
)

_COST: tuple[Column, ...] = (
    ("budget", "keep ratio that the plan asked for", lambda r: _budget(r)),
    ("TTFT ms", "from pixels to the first token", lambda r: _time(r.cost, "ttft")),
    ("encoder ms", "vision encoder and projector", lambda r: _time(r.cost, "encoder")),
    ("prefill ms", "language model, up to the first token", lambda r: _time(r.cost, "prefill")),
    (
        "choosing ms",
        "what the method itself costs: it less a replay of what it kept; below: of the "
        "uncompressed prefill; noise can make it negative",
        lambda r: _choosing(r.cost),
    ),
    ("decode ms", "each later token", lambda r: _time(r.cost, "decode")),
    (
        "peak MiB",
        "most memory in use up to the first token of the batch, beyond weights and inputs",
        lambda r: _size(r.cost, lambda c: (c.peak_bytes / 2**20, c.peak_ratio), ".1f"),
    ),
    (
        "KV cache KiB",
        "keys and values of a prompt",
        lambda r: _size(r.cost, lambda c: (c.kv_bytes / 2**10, c.kv_ratio), ".0f"),
    ),
    (
        "GMAC",
        "prefill of a prompt's visual tokens, analytic",
        lambda r: _size(r.cost, lambda c: (c.flops["mac3"] / 1e9, c.flops_ratio["mac3"]), ".3g"),
    ),
)


def results_table(results: Results) -> Table:
    """Make the table of accuracy and what stands beside it, one line a method and budget."""
    rows = [row for row in results.summary.rows if row.accuracy is not None]
    return _table(results, rows, _RESULTS)


def cost_table(results: Results) -> Table | None:
    """Make the table of times, memory and FLOPs; None where nothing was timed."""
    rows = [row for row in results.summary.rows if row.cost is not None]
    return _table(results, rows, _COST) if rows else None


def kind_of(results: Results, group: str) -> str:
    """Name how a group is drawn: `none`, `blind`, `oracle`, `control` or `method`."""
    special = {"none": "none", BLIND: "blind", ORACLE: "oracle"}
    return special.get(group, "control" if group in results.controls else "method")


def _table(results: Results, rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    """Lay out all columns that say something."""
    made = [[make(row) or Field(text="") for row in rows] for _, _, make in columns]
    used = [i for i, column in enumerate(made) if any(field.text for field in column)]
    lines, previous = [], None
    for number, row in enumerate(rows):
        seeds = f", {row.seeds} seeds" if row.seeds > 1 else ""
        lines.append(
            Line(
                name=name_of(row.group) + seeds,
                kind=kind_of(results, row.group),
                first=row.group != previous,
                fields=tuple(made[i][number] for i in used),
            )
        )
        previous = row.group
    return Table(columns=tuple(columns[i][:2] for i in used), lines=tuple(lines))


def _budget(row: Row) -> Field:
    alone = row.uncompressed or row.group == BLIND
    return Field(text=DASH if alone else ratio(row.keep_ratio), sort=row.keep_ratio or 0.0)


def _kept_mean(row: Row) -> Field:
    share = f"{percent(row.kept_mean / row.visual_tokens)} %" if row.visual_tokens else ""
    return Field(text=f"{row.kept_mean:.1f}", below=share, sort=row.kept_mean)


def _kept_end(row: Row) -> Field:
    share = f"{percent(row.kept_end / row.visual_tokens)} %" if row.visual_tokens else ""
    return Field(text=f"{row.kept_end:.1f}", below=share, sort=row.kept_end)


def _share(value: Interval | None) -> Field | None:
    if value is None:
        return None
    below = signed(bounds(value))
    return Field(text=signed(percent(value.mean)), below=below, sort=value.mean)


def _gap(value: Interval | None) -> Field | None:
    if value is None:
        return None
    below = f"{points(value.low)} to {points(value.high)}"
    return Field(text=points(value.mean), below=below, sort=value.mean)


def _hard(row: Row) -> Field | None:
    if row.hard is None:
        return None
    return Field(
        text=percent(row.hard.mean),
        below=f"{bounds(row.hard)}, n = {row.hard_questions}",
        sort=row.hard.mean,
    )


def _time(cost: Cost | None, name: str) -> Field | None:
    if cost is None:
        return None
    spent: Quantiles | None = getattr(cost, f"{name}_ms")
    times: Quantiles | None = getattr(cost, f"{name}_ratio")
    if spent is None or times is None:
        return None
    below = f"{times.median:.2f}{TIMES} ({times.p20:.2f}{DASH}{times.p80:.2f})"
    return Field(text=f"{spent.median:.1f}", below=below, sort=times.median)


def _choosing(cost: Cost | None) -> Field | None:
    if cost is None or cost.overhead_ms is None or cost.overhead_share is None:
        return None
    share = cost.overhead_share
    low, middle, high = (f"{100 * value:.0f}" for value in (share.p20, share.median, share.p80))
    below = f"{middle} % ({low} to {high})"
    text = signed(f"{cost.overhead_ms.median:.1f}")
    return Field(text=text, below=signed(below), sort=cost.overhead_ms.median)


def _size(
    cost: Cost | None, pick: Callable[[Cost], tuple[float, float]], form: str
) -> Field | None:
    if cost is None:
        return None
    value, times = pick(cost)
    return Field(text=format(value, form), below=f"{times:.2f}{TIMES}", sort=value)


@dataclass(frozen=True, kw_only=True)
class TaskCard:
    """A task: the tokens it needs, and its share answerable without them."""

    name: str
    needs: str
    figures: tuple[tuple[str, str], ...]
    turns: tuple[str, ...] = ()


def task_cards(results: Results) -> list[TaskCard]:
    """Make one card a task, in the order of the plan."""
    summary = results.summary
    base, blind = summary.find("none"), summary.find(BLIND)
    cards = []
    for name, chance in summary.chance.items():
        figures = [("best constant answer", f"{percent(chance)} %")]
        for label, row in (("no image", blind), ("uncompressed", base)):
            if row is not None and row.tasks is not None:
                figures.append((label, f"{percent(row.tasks[name].mean)} %"))
        if base is not None and base.gain is not None and name in base.gain:
            figures.append(("gain from the picture", f"{points(base.gain[name].mean)} points"))
        if name in summary.leakage:
            figures.append(("leakage", f"{points(summary.leakage[name])} points"))
        methods = [
            row.tasks[name].mean
            for row in summary.rows
            if row.tasks is not None and kind_of(results, row.group) == "method"
        ]
        if methods:
            figures.append(("methods, mean", f"{percent(fmean(methods))} %"))
        turns = base.turns.get(name, ()) if base is not None and base.turns else ()
        cards.append(
            TaskCard(
                name=name,
                needs=results.manifest["tasks"][name]["needs"],
                figures=tuple(figures),
                turns=tuple(f"{percent(turn.mean)} %" for turn in turns),
            )
        )
    return cards
