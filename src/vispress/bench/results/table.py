"""The tables that `vispress bench` prints."""

from statistics import fmean

from rich.console import Group, RenderableType
from rich.text import Text

from vispress.bench.results.cost_table import cost_table
from vispress.bench.results.published import beside_published, published_sheet
from vispress.bench.results.ranking import Ranking
from vispress.bench.results.sheet import Sheet
from vispress.bench.results.stats import Interval
from vispress.bench.results.summary import BLIND, Row, Summary

_OVERVIEW = (
    "method", "asked", "kept, mean", "at the end", "accuracy %", "gap closed %", "hard %",
    "loyalty %", "TTFT x", "KV cache x",
)  # fmt: skip


def tables(summary: Summary) -> RenderableType:
    """Make the tables of accuracy and cost by method, by task, and of what could not be run."""
    parts: list[RenderableType] = [_overview(summary), _by_task(summary)]
    costs = [(_name(row), row.cost) for row in summary.rows if row.cost is not None]
    if costs:
        parts.append(cost_table(costs, summary.plan["timing"]["batch"]))
    if printed := beside_published(summary):
        parts.append(published_sheet(printed))
    if summary.comparisons:
        parts.append(_against_controls(summary))
    parts += [ranking_text(ranking) for ranking in summary.rankings]
    reasons = [f"{_name(row)}: {row.refused}" for row in summary.rows if row.refused]
    if reasons:
        parts.append(Text("Not run:\n  " + "\n  ".join(reasons), style="yellow"))
    if summary.missing:
        parts.append(Text(f"{summary.missing} cells are missing", style="yellow"))
    return Group(*parts)


def _overview(summary: Summary) -> Sheet:
    plan = summary.plan
    table = Sheet(
        title=f"{plan['model']}: {plan['questions']} questions a task, {len(plan['tasks'])} tasks",
        caption="asked: "
        + (
            "mean over decoder layers"
            if plan["budget"] == "mean"
            else "at one placement (mean over layers where a method has a schedule)"
        )
        + "; kept: visual tokens of an image; TTFT: from pixels to first token, x uncompressed, "
        "p20-p80; gap closed: 0 is random, 100 the oracle; hard: questions that a smaller picture "
        "of as many tokens loses, and how many; loyalty: answers as uncompressed; intervals: 95 %",
        columns=_OVERVIEW,
    )
    previous = ""
    for row in summary.rows:
        if previous and row.group != previous:
            table.add_section()
        previous = row.group
        table.add_row(_name(row, ratio=False), _asked(row), *_overview_cells(row))
    chance = fmean(summary.chance.values())
    table.add_section()
    table.add_row("best constant answer", *[""] * 3, f"{100 * chance:.1f}", *[""] * 5, style="dim")
    return table


def _overview_cells(row: Row) -> list[str]:
    if row.accuracy is None:
        return ["", "", "not run", *[""] * 5]
    ratio = None if row.cost is None else row.cost.ttft_ratio
    return [
        f"{row.kept_mean:.1f}",
        f"{row.kept_end:.1f} of {row.visual_tokens:.0f}",
        _interval(row.accuracy),
        "" if row.gap_closed is None else _interval(row.gap_closed, digits=0),
        "" if row.hard is None else f"{100 * row.hard.mean:.0f} of {row.hard_questions}",
        "" if row.loyalty is None else f"{100 * row.loyalty.mean:.1f}",
        "" if ratio is None else f"{ratio.median:.2f} ({ratio.p20:.2f}-{ratio.p80:.2f})",
        "" if row.cost is None else f"{row.cost.kv_ratio:.2f}",
    ]


def _by_task(summary: Summary) -> Sheet:
    title = "accuracy % by task (95 % interval below)"
    table = Sheet(title=title, caption="", columns=("method", *summary.chance))
    for row in summary.rows:
        if row.tasks is not None:
            cells = [_stacked(row.tasks[task]) for task in summary.chance]
            style = "bold" if row.uncompressed else "cyan" if row.group == BLIND else ""
            table.add_row(_name(row), *cells, style=style)
    table.add_section()
    chance = [f"{100 * value:.0f}" for value in summary.chance.values()]
    table.add_row("best constant answer", *chance, style="dim")
    if summary.leakage:
        leaks = [f"{100 * summary.leakage[task]:.0f}" for task in summary.chance]
        table.add_row("leakage: blind beyond it", *leaks, style="dim")
    return table


def ranking_text(ranking: Ranking) -> Text:
    """Write the certain part of an order: places each may have, and tiers apart from each other."""
    text = Text(f"\nranking at {ranking.keep_ratio:g} (all pairs, sign-flip test, Holm): ", "bold")
    if ranking.tied:
        names = ", ".join(place.group for place in ranking.places)
        return text.append(f"none, no pair differs significantly: {names}", "")
    text.append("places that are possible; a line parts those that all differ from all below", "")
    tier = 1
    for place in ranking.places:
        text.append("\n  ----" if place.tier != tier else "", "dim")
        tier = place.tier
        span = str(place.first) if place.first == place.last else f"{place.first}-{place.last}"
        text.append(f"\n  {span:>7}  {place.group} ({100 * place.accuracy:.1f})", "")
    return text


def _against_controls(summary: Summary) -> Sheet:
    table = Sheet(
        title="methods less controls at equal budget, accuracy in points (95 % interval)",
        caption="paired sign-flip test, Holm-corrected over methods; = where nothing is shown at "
        "5 %. Random is the best control where no other is named; the best is chosen on the same "
        "answers, which favours it",
        columns=("method", "asked", "against", "difference", "p", "verdict"),
        words=("against", "verdict"),
    )
    for test in summary.comparisons:
        gap = test.difference
        verdict = "=" if not test.significant else "better" if gap.mean > 0 else "worse"
        against = test.control if test.against == "random" else f"best control, {test.control}"
        difference = f"{100 * gap.mean:+.1f} ({100 * gap.low:+.1f} to {100 * gap.high:+.1f})"
        ratio = f"{test.keep_ratio:g}"
        table.add_row(test.group, ratio, against, difference, f"{test.p_holm:.2g}", verdict)
    return table


def _name(row: Row, *, ratio: bool = True) -> str:
    names = {"none": "uncompressed", BLIND: "no_image (blind)"}
    name = names.get(row.group, row.group)
    if ratio and row.keep_ratio is not None:
        name += f" {row.keep_ratio:g}"
    return name + (f" ({row.seeds} seeds)" if row.seeds > 1 else "")


def _asked(row: Row) -> str:
    return "" if row.keep_ratio is None else f"{row.keep_ratio:g}"


def _interval(value: Interval, *, digits: int = 1) -> str:
    mean, low, high = (f"{100 * x:.{digits}f}" for x in (value.mean, value.low, value.high))
    return f"{mean} ({low}-{high})" if value.low >= 0 else f"{mean} ({low} to {high})"


def _stacked(value: Interval) -> Text:
    low, high = 100 * value.low, 100 * value.high
    return Text(f"{100 * value.mean:.0f}\n").append(f"{low:.0f}-{high:.0f}", style="dim")
