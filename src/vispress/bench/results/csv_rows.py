"""`summary.csv`: one line a row of the table and task, the mean over tasks included."""

import csv
import io
from statistics import fmean
from typing import TYPE_CHECKING, Any

from vispress.bench.results.cost_rows import CSV_COLUMNS, csv_cells
from vispress.bench.results.stats import Interval

if TYPE_CHECKING:
    from vispress.bench.results.summary import Row, Summary

_COLUMNS = (
    "method", "control", "keep_ratio", "seeds", "task", "accuracy", "low", "high", "chance",
    "leakage", "gain", "gain_low", "gain_high", "turns", "loyalty", "gap_closed", "gap_closed_low",
    "gap_closed_high", "hard", "hard_low", "hard_high", "hard_questions", "visual_tokens",
    "kept_mean_over_layers", "kept_at_end", *CSV_COLUMNS, "refused",
)  # fmt: skip


def csv_text(summary: "Summary") -> str:
    """Write the whole file as text; what was not measured is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    chance = {**summary.chance, "mean": fmean(summary.chance.values())}
    leaks = dict(summary.leakage)
    if leaks:
        leaks["mean"] = fmean(leaks.values())
    for row in summary.rows:
        shared: dict[str, Any] = {
            "method": row.group,
            "control": int(row.control),
            "keep_ratio": row.keep_ratio,
            "seeds": row.seeds,
            "refused": row.refused,
        }
        if row.tasks is None or row.accuracy is None:
            writer.writerow(shared)
            continue
        shared |= _of_row(row)
        for task, accuracy in [*row.tasks.items(), ("mean", row.accuracy)]:
            gain = row.mean_gain if task == "mean" else (row.gain or {}).get(task)
            turns = (row.turns or {}).get(task, ())
            writer.writerow(
                shared
                | _three("accuracy", accuracy, low="low", high="high")
                | _three("gain", gain)
                | {
                    "task": task,
                    "chance": chance[task],
                    "leakage": leaks.get(task),
                    "turns": " ".join(f"{turn.mean:.4f}" for turn in turns),
                }
            )
    return text.getvalue()


def _of_row(row: "Row") -> dict[str, Any]:
    """Fill the columns that are the same for all tasks of a row."""
    return {
        "loyalty": None if row.loyalty is None else row.loyalty.mean,
        **_three("gap_closed", row.gap_closed),
        **_three("hard", row.hard),
        "hard_questions": row.hard_questions,
        "visual_tokens": row.visual_tokens,
        "kept_mean_over_layers": row.kept_mean,
        "kept_at_end": row.kept_end,
        **csv_cells(row.cost),
    }


def _three(
    name: str, value: Interval | None, *, low: str | None = None, high: str | None = None
) -> dict[str, Any]:
    if value is None:
        return {}
    ends = (low or f"{name}_low", high or f"{name}_high")
    return {name: value.mean, ends[0]: value.low, ends[1]: value.high}
