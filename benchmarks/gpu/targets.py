"""The targets of a run: how often each was met, and where it was missed most."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.record import Part, Row, read_json, write_json

LARGE = ("qwen_16384", "video")
"""Sizes at which an op that is bound by bytes should run at the rate of a copy."""
WORST = 4


@dataclass(frozen=True)
class Target:
    """A limit on one number of some rows.

    Args:
        name: For the table.
        part: Whose rows.
        key: Of the number; rows without it (an op that was not tested) say nothing.
        limit: Met from here on.
        at_most: Met up to the limit instead.
        large: Only large sizes of ops that are bound by bytes.
        of: Only rows with one of these in their name.
    """

    name: str
    part: str
    key: str
    limit: float
    at_most: bool = False
    large: bool = False
    of: tuple[str, ...] = ("",)

    def values(self, rows: Iterable[Row]) -> Iterator[tuple[str, float]]:
        """Names and numbers that it speaks of."""
        for row in rows:
            counts = not self.large or (row.get("bound") == "bytes" and row["size"] in LARGE)
            counts = counts and any(part in row["name"] for part in self.of)
            if counts and isinstance(row.get(self.key), int | float):
                yield row["name"], float(row[self.key])

    def met(self, value: float) -> bool:
        """Whether a number is within the limit."""
        return value <= self.limit if self.at_most else value >= self.limit


BUSY = ("/b8/", "/b32/")
"""Batches at which the device, not the host, is the limit."""
TARGETS = (
    Target("share of copy rate, large", "bandwidth", "share_of_floor_in_graph", 0.85, large=True),
    Target("times torch.compile", "bandwidth", "speedup_over_compiled", 1.5),
    Target("overhead / uncompressed prefill", "models", "overhead_share", 0.01, at_most=True),
    Target("share of just that length", "models", "share_of_just_that_length", 0.95),
    Target(
        "captured LLaVA-1.5 at 64 tokens, batch 1, times untouched",
        *("captured", "captured_prefill_speedup", 2.0),
        of=("llava_1_5_7b/b1/divprune",),
    ),
    Target(
        "captured: choosing / untouched prefill, large batches",
        *("captured", "captured_choosing_share", 0.03),
        at_most=True,
        of=BUSY,
    ),
    Target(
        "captured: share of just that length, large batches",
        *("captured", "captured_share_of_that_length", 0.95),
        of=BUSY,
    ),
    Target("captured: decode step, times untouched", "captured", "captured_step_speedup", 1.0),
)


def write_summary(parts: Iterable[Part], out: Path) -> dict[str, Any]:
    """`summary.json` of these parts, small; written only when it changed."""
    known = {part.name: part for part in parts}
    summary = {
        "parts": {name: _state(part) for name, part in known.items()},
        "targets": [_counted(t, known[t.part].rows) for t in TARGETS if t.part in known],
    }
    path = out / "summary.json"
    if known and read_json(path) != summary:
        write_json(path, summary)
    return summary


def _state(part: Part) -> dict[str, Any]:
    found = {"complete": part.complete, "rows": len(part.rows)}
    found |= {"not_reached": len(part.not_reached)}
    found["errors"] = sum("error" in row for row in part.rows)
    broken = [r["name"] for r in part.rows if r.get("ok") is False or r.get("status") == "red"]
    return found | {"broken": broken[:20]}


def _counted(target: Target, rows: Iterable[Row]) -> dict[str, Any]:
    values = sorted(target.values(rows), key=lambda one: one[1], reverse=target.at_most)
    missed = [one for one in values if not target.met(one[1])]
    return {
        "target": target.name,
        "limit": target.limit,
        "at_most": target.at_most,
        "met": len(values) - len(missed),
        "missed": len(missed),
        "worst": dict(missed[:WORST]),
    }


def print_targets(summary: dict[str, Any]) -> None:
    """A line a target: limit, how often it was met and missed, and the worst few."""
    if not summary["targets"]:
        return
    print("\n== targets")
    for entry in summary["targets"]:
        sign = "<=" if entry["at_most"] else ">="
        worst = ", ".join(f"{name} {value:.3g}" for name, value in entry["worst"].items())
        print(
            f"  {entry['target']} {sign} {entry['limit']:g}: "
            f"{entry['met']} met, {entry['missed']} missed" + (f"; worst: {worst}" if worst else "")
        )
