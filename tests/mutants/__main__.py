"""Run mutants: `python -m tests.mutants [-k TEXT] [--jobs N]`; 1 if one survives.

What no mutant changes (torch, transformers, the tiny models) is loaded once; each mutant is then a
fork of this process, with a copy of the code in front of its path.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.mutants import CODE, ROOT, Mutant, copy_code, mutants

DID_NOT_RUN = (3, 4, 5)
"""pytest's codes for tests that were not run; 0 is for those that passed, and 2 for a fault that
shows while cases are worked out, for which compressed models run."""
ELSEWHERE = 99
"""The copy is not what is imported."""
MINUTES = 15
FORK = multiprocessing.get_context("fork")


@dataclass
class Run:
    """A mutant under test."""

    mutant: Mutant
    folder: Any
    process: Any
    started: float

    @property
    def output(self) -> Path:
        """What its tests printed."""
        return Path(self.folder.name) / "output"


def load() -> None:
    """Load what all mutants share, and none of what they change."""
    import pytest  # noqa: F401

    from tests import conftest  # noqa: F401  (sets how triton is imported)
    from tests.tiny_models import FAMILIES, build

    for family in FAMILIES:
        build(family)
    assert not {"vispress", "vispress_kernels"} & set(sys.modules)


def test(killer: str, folder: str, output: str) -> None:
    """Run the tests of a mutant in this (forked) process, and end it with pytest's code."""
    import pytest

    with Path(output).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    paths = [str(Path(folder) / part) for part in CODE]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # for processes that tests start
    os.chdir(ROOT)
    import vispress_kernels

    if not str(vispress_kernels.__file__).startswith(folder):
        os._exit(ELSEWHERE)
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--by-default"]
    code = pytest.main([*options, killer])
    sys.stdout.flush()
    os._exit(int(code))


def start(mutant: Mutant) -> Run | str:
    """Begin to test a mutant; or why it does not apply."""
    folder = tempfile.TemporaryDirectory()
    copy_code(Path(folder.name))
    if trouble := mutant.apply(Path(folder.name)):
        return trouble
    run = Run(mutant, folder, None, time.monotonic())
    arguments = mutant.killer, folder.name, str(run.output)
    run.process = FORK.Process(target=test, args=arguments)
    run.process.start()
    return run


def verdict(run: Run) -> tuple[str, str] | None:
    """Say what became of a mutant, and what its tests printed; None while they run."""
    if run.process.is_alive():
        if time.monotonic() - run.started < 60 * MINUTES:
            return None
        run.process.kill()
        run.process.join()
        return "killed", "it never ends"
    code, output = run.process.exitcode, run.output.read_text()
    run.folder.cleanup()
    if code in (*DID_NOT_RUN, ELSEWHERE):
        return "tests did not run", output
    return ("killed" if code else "survived"), output  # below 0: the process died of it


def run_all(chosen: Sequence[Mutant], jobs: int) -> Iterator[tuple[Mutant, str, str]]:
    """Give mutants with what became of them and what was printed, as they end."""
    left, running = list(chosen), list[Run]()
    while left or running:
        while left and len(running) < jobs:
            mutant = left.pop(0)
            begun = start(mutant)
            if isinstance(begun, str):
                yield mutant, "does not apply", begun
            else:
                running.append(begun)
        time.sleep(0.1)
        for run in list(running):
            if (found := verdict(run)) is not None:
                running.remove(run)
                yield run.mutant, *found


def main() -> None:
    """Run those that are asked for and print a line each."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants")
    parser.add_argument(
        "-k", default="", help="of mutants whose name, file or killer holds this, or this|that"
    )
    parser.add_argument("--jobs", type=int, default=1, help="at a time")
    args = parser.parse_args()
    wanted = args.k.split("|")
    chosen = [
        one
        for one in mutants()
        if any(text in f"{one.name} {one.target} {one.killer}" for text in wanted)
    ]
    load()
    counts: dict[str, int] = {}
    for mutant, found, output in run_all(chosen, args.jobs):
        counts[found] = counts.get(found, 0) + 1
        sys.stdout.write(f"{found:18} {mutant.name}  ({mutant.killer}: {mutant.what})\n")
        if found in ("does not apply", "tests did not run"):
            sys.stdout.write(output)
        sys.stdout.flush()
    summary = ", ".join(f"{count} {found}" for found, count in sorted(counts.items()))
    sys.stdout.write(f"{summary} of {len(chosen)}\n")
    sys.exit(set(counts) - {"killed"} != set())


if __name__ == "__main__":
    main()
