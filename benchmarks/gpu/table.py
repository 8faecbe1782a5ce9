"""The short tables that end a run."""

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.gpu.record import Part, Row


def print_tables(parts: Iterable[Part]) -> None:
    """What was measured, a block a part; the files hold the rest."""
    for part in parts:
        state = "complete" if part.complete else f"{len(part.not_reached)} rows not reached"
        print(f"\n== {part.name}: {state}, {part.used:.0f} s -> {part.path}")
        lines = _TABLES[part.name](part)
        if lines:
            _show(lines)
        errors = [row for row in part.rows if "error" in row]
        for row in errors[:8]:
            print(f"  error in {row['name']}: {row['error'][:160]}")
        if len(errors) > 8:
            print(f"  and {len(errors) - 8} more errors")


def _show(lines: Sequence[Sequence[str]]) -> None:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print(
            "  " + "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        )


def _number(value: Any, digits: int = 3) -> str:
    return "-" if not isinstance(value, int | float) else f"{value:.{digits}g}"


def _median(row: Row, key: str) -> str:
    spread = row.get(key)
    return _number(spread["median"]) if isinstance(spread, dict) else "-"


def _kernels(part: Part) -> list[list[str]]:
    rows = [["op", "tests", "passed", "failed", "skipped", "missing"]]
    for row in part.rows:
        counts = [str(row.get(k, 0)) for k in ("passed", "failed", "skipped", "missing")]
        rows.append([row["name"], row["status"], *counts])
    return rows


def _bandwidth(part: Part) -> list[list[str]]:
    rates = part.extra.get("ceilings", {})
    print(
        f"  copy {rates.get('copy_bytes_per_s', 0) / 1e12:.2f} TB/s, "
        f"bf16 {rates.get('bf16_flops_per_s', 0) / 1e12:.0f} TFLOP/s; times in ms, cold cache; "
        "speedups only where the op's tests are green"
    )
    rows = [["op/size", "kernel", "graph", "floor", "of floor", "x reference", "x compiled"]]
    for row in part.rows:
        if "kernel_ms" not in row or row["name"].endswith("/compile"):
            continue
        other = part.find(row["name"] + "/compile") or {}
        rows.append(
            [
                row["name"],
                _median(row, "kernel_ms"),
                _median(row, "graph_ms"),
                _number(row["floor_ms"]),
                _number(row.get("share_of_floor_in_graph"), 2),
                _number(row.get("speedup_over_reference")),
                _number(other.get("speedup_over_compiled")),
            ]
        )
    return rows


def _models(part: Part) -> list[list[str]]:
    """A row a method; what is uncompressed comes from its row of the batch, or its own rounds."""
    head = ["model/batch/method", "prefill ms", "plain", "x", "x of that length", "overhead %"]
    head += ["host ms", "plain", "text", "TTFT x", "decode ms", "plain", "KV MiB", "plain"]
    rows = [head]
    for row in part.rows:
        if row.get("launch_bound"):
            host, prefill = (
                _median(row[k], row["method"]) for k in ("host_prefill_ms", "prefill_ms")
            )
            print(f"  {row['name']}: launch-bound, host {host} ms of a prefill of {prefill} ms")
        if "prefill_speedup" not in row:
            continue
        prefill, host = row["prefill_ms"], row["host_ms"]
        base = part.find(row["against"]) or {}
        rows.append(
            [
                row["name"],
                _median(prefill, "compressed"),
                _median(prefill, "uncompressed"),
                _number(row["prefill_speedup"]),
                _number(row["share_of_just_that_length"]),
                _number(100 * row["overhead_share"], 2),
                *(_median(host, name) for name in ("compressed", "uncompressed", "text")),
                _number(row["ttft_speedup"]),
                _median(row["decode_ms_per_token"], "compressed"),
                _median(base.get("decode_ms_per_token", {}), "uncompressed"),
                _number(row["kv_bytes"] / 2**20),
                _number(row["uncompressed_kv_bytes"] / 2**20),
            ]
        )
    return rows


def _captured(part: Part) -> list[list[str]]:
    head = ["model/batch/method", "TTFT ms", "plain", "captured", "plain", "prefill x"]
    rows = [[*head, "of that length", "step ms", "plain", "captured", "plain", "graphs"]]
    for row in part.rows:
        if "captured_prefill_speedup" not in row:
            continue
        own, plain = row["compressed"], row["uncompressed"]
        ttft, step = (
            [_median(kind[how], what) for how in ("eager", "captured") for kind in (own, plain)]
            for what in ("ttft_ms", "step_ms")
        )
        speed = _number(row["captured_prefill_speedup"])
        share = _number(row["captured_share_of_that_length"])
        graphs = str(own["captured"]["graphs"])
        rows.append([row["name"], *ttft, speed, share, *step, graphs])
        if fallbacks := own["captured"]["fallbacks"]:
            print(f"  {row['name']}: without a graph: {fallbacks}")
    return rows


def _laws(part: Part) -> list[list[str]]:
    rows = [["law", "held", "broken", "first broken"]]
    for law, (held, broken) in part.extra.get("held_and_broken", {}).items():
        bad = [r["name"] for r in part.rows if r["name"].startswith(law) and not r.get("ok")]
        rows.append([law, str(held), str(broken), ", ".join(bad[:4])])
    return rows


def _sweep(part: Part) -> list[list[str]]:
    rows = [["op/size", "default ms", "best ms", "gain", "winner"]]
    for row in part.rows:
        if "default_ms" not in row:
            continue
        best, gain = _number(row["winner_ms"]), _number(row["gain"])
        rows.append([row["name"], _median(row, "default_ms"), best, gain, str(row["winner"])])
    return rows


_TABLES = {
    "kernels": _kernels,
    "bandwidth": _bandwidth,
    "captured": _captured,
    "models": _models,
    "laws": _laws,
    "sweep": _sweep,
}
