"""Part `kernels`: the kernel tests, compiled, in a process of their own; counts by op."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.changed import carried, changed, last_run, of_kernel_tests
from benchmarks.gpu.record import ROOT, Deadline, Part, Row, Settings, read_json
from benchmarks.gpu.shards import workers_for

OPS = (
    "gather_tokens",
    "merge_tokens",
    "query_attention",
    "column_attention",
    "transition_scores",
    "perturbation_scores",
    "dct_lowpass",
    "assign_nearest",
    "maxmin_select",
    "dpp_select",
    "cover_select",
    "distinct_select",
    "kmeans_starts",
)
FILES = (*OPS, "greedy", "backend")
"""Test files that run; `compile` needs no GPU and runs in CI."""
DRY = ("transition_scores",)
WORKERS = 14


def run_part(settings: Settings, deadline: Deadline) -> Part:
    """Run the tests of what changed; a row an op, `green` when one passed and none failed."""
    part = Part("kernels", settings, deadline)
    if part.complete:
        return part
    if find_spec("pytest") is None:
        part.rows = [{"name": name, "status": "unknown", "passed": 0} for name in FILES]
        part.extra = {"note": "pytest is not installed: no test ran"}
        part.save()
        return part
    digests = {name: of_kernel_tests(name) for name in (DRY if settings.dry else FILES)}
    last = last_run("kernels", settings)
    still = carried(last, lambda row: row["status"] == "green")
    again = [n for n in digests if n in changed(last, digests) or n not in still]
    rows, part.extra = _run_tests(settings, deadline, again) if again else ([], {"stopped": False})
    part.rows = [*rows, *(row for name, row in still.items() if name in digests.keys() - again)]
    part.extra["digests"] = digests
    part.complete = not part.extra["stopped"]
    part.save()
    return part


def statuses(settings: Settings) -> dict[str, str]:
    """`green`, `red` or `unknown` for each op, from the part's file of this identity."""
    known = read_json(settings.out / "kernels.json")
    if known is None or known.get("identity") != settings.identity:
        return dict.fromkeys(OPS, "unknown")
    found = {row["name"]: row["status"] for row in known["rows"]}
    return {op: found.get(op, "unknown") for op in OPS}


def _run_tests(
    settings: Settings, deadline: Deadline, names: Sequence[str]
) -> tuple[list[Row], dict[str, Any]]:
    files = [f"tests/kernels/test_{name}.py" for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu.tally"]
    command += ["-p", "no:cacheprovider", "--continue-on-collection-errors", *files]
    workers = workers_for(WORKERS)
    if not settings.dry and workers > 1 and find_spec("xdist") is not None:
        command += ["-n", str(workers)]
    with tempfile.TemporaryDirectory() as folder:
        tally = Path(folder) / "tally.jsonl"
        log = Path(folder) / "log"
        stopped = not _finishes(command, _environment(tally, settings.dry), log, deadline.left)
        tail = log.read_text(errors="replace")[-1500:]
        lines = tally.read_text().splitlines() if tally.exists() else []
    rows = count([json.loads(line) for line in lines], names)
    return rows, {"stopped": stopped, "workers": workers, "output_tail": tail}


def _finishes(command: list[str], env: dict[str, str], log: Path, seconds: float) -> bool:
    """Run to the end, or stop it with its workers, which would disturb what is timed next."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True
        )
        try:
            process.wait(timeout=max(1.0, seconds))
            return True
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return False


def _environment(tally: Path, dry: bool) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    if not dry:
        kept.pop("TRITON_INTERPRET", None)
    places = [str(ROOT), str(ROOT / "src"), str(ROOT / "kernels")]
    known = os.environ.get("PYTHONPATH")
    path = os.pathsep.join(places + ([known] if known else []))
    return kept | {"PYTHONPATH": path, "VISPRESS_TALLY": str(tally)}


def count(entries: list[dict[str, Any]], names: Sequence[str]) -> list[Row]:
    """Rows by test file from the tally; a test counts once, with its worst outcome.

    An op is green when every collected test of its file ran, none failed and one passed.

    Args:
        entries: Outcomes (`test`, `outcome`, `text`) and counts (`test`, `"collected"`, `number`),
            repeats allowed.
        names: Ops (or files) that should have run.
    """
    worst: dict[str, str] = {}
    texts: dict[str, str] = {}
    collected: dict[str, int] = {}
    order = {"passed": 0, "skipped": 1, "missing": 2, "failed": 3}
    for entry in entries:
        test, outcome = entry["test"], entry["outcome"]
        if outcome == "collected":
            collected[test] = entry["number"]
        elif order[outcome] >= order[worst.get(test, "passed")]:
            worst[test] = outcome
            texts[test] = entry.get("text", "")
    rows = []
    for name in names:
        file = f"tests/kernels/test_{name}.py"
        own = {t: o for t, o in worst.items() if t.startswith(file)}
        counts = Counter(own.values())
        failed = [t for t, o in own.items() if o == "failed"]
        whole = len(own) >= collected.get(file, 1) and not counts["missing"]
        rows.append(
            {
                "name": name,
                "status": "red" if failed else "green" if whole and counts["passed"] else "unknown",
                "collected": collected.get(file, 0),
                **{outcome: counts[outcome] for outcome in order},
                "failures": [{"test": t, "text": texts[t]} for t in failed[:5]],
            }
        )
    return rows
