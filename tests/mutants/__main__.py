"""Run mutants: `python -m tests.mutants [-k TEXT] [--jobs N]`; 1 if one survives."""

import argparse
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.mutants import CODE, ROOT, Mutant, copy_code, mutants

DID_NOT_RUN = (2, 3, 4, 5)
"""pytest's codes for tests that were not run; 0 is for those that passed."""
MINUTES = 10


def verdict(mutant: Mutant) -> tuple[str, str]:
    """Say what became of a mutant (killed, survived, ...), and what the tests printed."""
    with tempfile.TemporaryDirectory() as folder:
        copy_code(Path(folder))
        if trouble := mutant.apply(Path(folder)):
            return "does not apply", trouble
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
        paths = os.pathsep.join(str(Path(folder) / part) for part in CODE)
        env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        try:
            done = subprocess.run(
                [*command, mutant.killer],
                cwd=ROOT, env=env, capture_output=True, text=True, timeout=60 * MINUTES,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return "killed", "it never ends"
    if done.returncode in DID_NOT_RUN:
        return "tests did not run", done.stdout + done.stderr
    return "killed" if done.returncode else "survived", ""  # below 0: the process died of it


def check_copies() -> None:
    """Make sure that a copy is what tests import.

    Raises:
        SystemExit: It is not.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy_code(Path(folder))
        paths = os.pathsep.join(str(Path(folder) / part) for part in CODE)
        code = "import vispress, vispress_kernels as k; print(vispress.__file__, k.__file__)"
        env = os.environ | {"PYTHONPATH": paths}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    if done.stdout.count(folder) != len(CODE):
        raise SystemExit(f"a copy in {folder} is not what is imported: {done.stdout}{done.stderr}")


def main() -> None:
    """Run those that are asked for and print a line each."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants")
    parser.add_argument("-k", default="", help="mutants whose name, file or killer holds this")
    parser.add_argument("--jobs", type=int, default=1, help="at a time")
    args = parser.parse_args()
    chosen = [one for one in mutants() if args.k in f"{one.name} {one.target} {one.killer}"]
    check_copies()
    counts: dict[str, int] = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        for mutant, (found, output) in zip(chosen, pool.map(verdict, chosen), strict=True):
            counts[found] = counts.get(found, 0) + 1
            sys.stdout.write(f"{found:18} {mutant.name}  ({mutant.killer}: {mutant.what})\n")
            if found in ("does not apply", "tests did not run"):
                sys.stdout.write(output)
            sys.stdout.flush()
    sys.stdout.write(", ".join(f"{count} {found}" for found, count in sorted(counts.items())))
    sys.stdout.write(f" of {len(chosen)}\n")
    sys.exit(set(counts) - {"killed"} != set())


if __name__ == "__main__":
    main()
