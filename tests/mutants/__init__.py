"""Small faults that the default selection of tests must notice: one patch each.

A patch is a unified diff of one file below `src/` or `kernels/`. Above it stand the test file (or
test) that kills the fault, and what the fault is:

    Killed by: tests/kernels/test_greedy.py
    What: ties between programs

`python -m tests.mutants` runs them all, each in a copy of the code, and says which survived. A test
holds that each still applies; one that does not any more is written anew for the code as it is.
"""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = ("src", "kernels")


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Args:
        patch: Its file.
        killer: Path of the test file, perhaps with `::` and a test.
        what: The fault in words.
        target: The file that is changed, from the root.
    """

    patch: Path
    killer: str
    what: str
    target: str

    @property
    def name(self) -> str:
        """The patch's file name without its ending."""
        return self.patch.stem

    def apply(self, root: Path, *, check: bool = False) -> str:
        """Change the code under `root` (or see whether it could be); what went wrong, or nothing.

        Args:
            root: Holds `src` and `kernels`.
            check: Change nothing.
        """
        # a line of context is enough: code around a fault may change
        command = ["git", "apply", "-C1", *(["--check"] if check else []), str(self.patch)]
        # as outside of any repository: paths in patches are from `root`
        env = {"PATH": os.environ["PATH"], "GIT_CEILING_DIRECTORIES": str(root.parent)}
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
        return done.stderr if done.returncode else ""


def read(patch: Path) -> Mutant:
    """Read a patch and its header."""
    lines = patch.read_text().splitlines()
    header = dict(line.split(": ", 1) for line in lines[:2])
    targets = [line.removeprefix("+++ b/") for line in lines if line.startswith("+++ b/")]
    (target,) = targets
    return Mutant(patch, header["Killed by"], header["What"], target)


def mutants() -> list[Mutant]:
    """All, by name."""
    return [read(patch) for patch in sorted(Path(__file__).parent.glob("*.patch"))]


def copy_code(to: Path) -> None:
    """Copy what mutants change, compiled files included, whose sources keep their times."""
    for folder in CODE:
        shutil.copytree(ROOT / folder, to / folder)
