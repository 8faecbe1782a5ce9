"""Everything that needs a GPU, in one command of at most eight minutes.

    python benchmarks/gpu_suite.py --all
    python benchmarks/gpu_suite.py --parts bandwidth,sweep --out results
    python benchmarks/gpu_suite.py --all --dry-run      # tiny, on a CPU, in a minute

Parts, in this order: `kernels` (the kernel tests, compiled), `laws` (1 to 5 on the device),
`captured` (7B shapes as CUDA graphs), `models` (the same, eager, with more methods), `bandwidth`
(each op against reference, torch.compile and floor), `sweep` (launch rules). Tests and laws run for
what changed since the results that are committed for the device; the rest of them is carried over.
Each part writes one JSON file; `summary.json` says which targets were met. The same command again
goes on where time ran out, and measures nothing twice unless the code, the device or a version
changed, or `--force` is given. `--budget` scales the parts' time.
"""

import argparse
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

BUDGETS = {
    **{"kernels": 50.0, "laws": 80.0, "captured": 100.0},
    **{"models": 135.0, "bandwidth": 75.0, "sweep": 20.0},
}
"""Seconds a part may take; together with start-up and tables they stay within eight minutes."""
LIMIT = 460.0
ROOT = Path(__file__).resolve().parents[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts asked for; 0 unless a test or a law failed, or a measurement broke."""
    options = _parse(arguments)
    _prepare(options.dry_run)
    import torch

    from benchmarks.gpu.record import Deadline, Settings, identity
    from benchmarks.gpu.table import print_tables
    from benchmarks.gpu.targets import print_targets, write_summary

    if not options.dry_run and not torch.cuda.is_available():
        print("no CUDA device: nothing to measure (--dry-run runs everything tiny on a CPU)")
        return 2
    device = torch.device("cpu" if options.dry_run else "cuda")
    tied = identity(device, options.dry_run)
    out = options.out or _default_out(tied["device"], options.dry_run)
    known = None if options.force or options.dry_run else _results_of(tied["device"])
    settings = Settings(device, out, options.dry_run, tied, options.force, known)
    whole = Deadline(LIMIT * max(options.budget, 1.0))
    done, broken = [], False
    for name in options.parts:
        seconds = min(BUDGETS[name] * options.budget, whole.left)
        print(f"{name} ({seconds:.0f} s at most) ...", flush=True)
        try:
            done.append(_runner(name)(settings, Deadline(seconds)))
        except Exception:  # the other parts are worth having all the same
            traceback.print_exc()
            broken = True
    print_tables(done)
    print_targets(write_summary(done, out))
    return int(broken or any(bad(row) for part in done for row in part.rows))


def bad(row: dict[str, Any]) -> bool:
    """Whether a row says that something is wrong (memory that does not suffice is not)."""
    broken = "error" in row and row["error"] != "out of memory"
    return broken or row.get("ok") is False or row.get("status") == "red"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="every part")
    parser.add_argument("--parts", default="", help=f"some of {','.join(BUDGETS)}")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the JSON files (default: $OUT, else below benchmarks/results)",
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--force", action="store_true", help="measure again what is there")
    parser.add_argument("--budget", type=float, default=1.0, help="factor on the parts' times")
    options = parser.parse_args(arguments)
    asked = [name for name in options.parts.split(",") if name]
    unknown = sorted(set(asked) - set(BUDGETS))
    if unknown:
        parser.error(f"unknown parts {', '.join(unknown)}; known: {', '.join(BUDGETS)}")
    if not asked and not options.all:
        parser.error("give --all or --parts")
    options.parts = [name for name in BUDGETS if options.all or name in asked]
    return options


def _prepare(dry_run: bool) -> None:
    """Make the checkout importable; a dry run interprets kernels (read when triton comes in)."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    for folder in (ROOT / "kernels", ROOT / "src", ROOT):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))


def _default_out(device: str, dry_run: bool) -> Path:
    given = os.environ.get("OUT")
    if given and not dry_run:
        return Path(given)
    if dry_run:
        return Path(tempfile.gettempdir()) / "vispress-gpu-dry-run"
    return _results_of(device)


def _results_of(device: str) -> Path:
    """Where results of such a device are committed."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-").lower()
    return ROOT / "benchmarks" / "results" / f"gpu-{name}"


def _runner(name: str) -> Callable[[Any, Any], Any]:
    """A part's `run_part`, imported when it is its turn."""
    from importlib import import_module

    module = {"kernels": "kernel_tests", "captured": "captures"}.get(name, name)
    run: Callable[[Any, Any], Any] = import_module(f"benchmarks.gpu.{module}").run_part
    return run


if __name__ == "__main__":
    sys.exit(main())
