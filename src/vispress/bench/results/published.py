"""Measured results beside what papers print."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final

from vispress.bench.plan.cells import UNCOMPRESSED
from vispress.bench.plan.published import PublishedTable, load_published
from vispress.bench.results.sheet import Sheet
from vispress.bench.results.summary import Row, Summary

_SLACK: Final = 0.02


@dataclass(frozen=True, kw_only=True)
class Beside:
    """A measured figure beside a printed one, both in %.

    Args:
        group: Method as the results call it.
        tokens: The printed budget.
        what: `"relative"` or a task.
        measured: Of these results.
        low: Of its interval.
        high: Likewise.
        printed: By the paper.
        source: Which.
    """

    group: str
    tokens: int
    what: str
    measured: float
    low: float
    high: float
    printed: float
    source: str


def beside_published(summary: Summary) -> list[Beside]:
    """Put measured accuracy beside what papers print, where a plan names such a file.

    A row stands for a method at the tokens that it kept as a mean over layers. Measured relative
    accuracy is the mean over the plan's tasks: they are fewer than the papers' benchmarks.
    """
    name, whole = summary.plan.get("published"), summary.find(UNCOMPRESSED)
    if name is None or whole is None:
        return []
    published = load_published(name)
    found: list[Beside] = []
    for row in summary.rows:
        method = _method_of(summary, row)
        if method is None or row.accuracy is None or row.tasks is None:
            continue
        for table in published.tables:
            found += _relative(row, whole, method, table, published.tokens)
            found += _scores(row, method, table, published.tokens)
    return found


def _method_of(summary: Summary, row: Row) -> str | None:
    """The one method of a row; None for chains and the whole model."""
    for cell in summary.plan["cells"]:
        if cell["group"] == row.group and len(cell["methods"]) == 1:
            return str(cell["methods"][0]["method"])
    return None


def _near(row: Row, budgets: Mapping[int, Any], whole: int) -> int | None:
    """The printed budget that a row kept; shares of tokens, where its pictures have others."""
    share = row.kept_mean / row.visual_tokens if row.visual_tokens else 0.0
    for tokens in budgets:
        if abs(share - tokens / whole) <= _SLACK * tokens / whole + 1 / whole:
            return tokens
    return None


def _relative(
    row: Row, whole: Row, method: str, table: PublishedTable, tokens: int
) -> Iterator[Beside]:
    printed = table.relative.get(method, {})
    at = _near(row, printed, tokens)
    assert row.tasks is not None
    assert whole.tasks is not None
    shared = [name for name in row.tasks if whole.tasks[name].mean > 0]
    if at is None or not shared:
        return
    ratios = [
        [getattr(row.tasks[name], end) / whole.tasks[name].mean for name in shared]
        for end in ("mean", "low", "high")
    ]
    mean, low, high = (100 * fmean(values) for values in ratios)
    yield Beside(
        group=row.group, tokens=at, what="relative", measured=mean, low=low, high=high,
        printed=printed[at], source=table.source,
    )  # fmt: skip


def _scores(row: Row, method: str, table: PublishedTable, tokens: int) -> Iterator[Beside]:
    printed = table.scores.get(method, {})
    at = _near(row, printed, tokens)
    assert row.tasks is not None
    for name, value in (printed[at] if at is not None else {}).items():
        if (score := row.tasks.get(name)) is not None:
            mean, low, high = (100 * end for end in (score.mean, score.low, score.high))
            yield Beside(
                group=row.group, tokens=at or 0, what=name, measured=mean, low=low, high=high,
                printed=value, source=table.source,
            )  # fmt: skip


def published_sheet(found: list[Beside]) -> Sheet:
    """Lay measured and printed figures side by side for a terminal."""
    sheet = Sheet(
        title="measured beside published, %",
        caption="relative: mean over tasks of accuracy over the whole model's; papers average over "
        "benchmarks of their own, so a few points apart is no contradiction",
        columns=("method", "tokens", "what", "measured", "published", "source"),
        words=("what", "source"),
    )
    for one in found:
        measured = f"{one.measured:.1f} ({one.low:.1f}-{one.high:.1f})"
        source = one.source.partition(" (")[0]
        printed = f"{one.printed:.1f}"
        sheet.add_row(one.group, str(one.tokens), one.what, measured, printed, source)
    return sheet
