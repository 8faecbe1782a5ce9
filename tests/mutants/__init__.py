"""Small faults that the default selection of tests must notice: one patch each.

A patch is a unified diff of one file below `src/` or `kernels/`. Above it stand the test file (or
test) that kills the fault, and what the fault is:

    Killed by: tests/kernels/test_greedy.py
    What: ties between programs

`python -m tests.mutants` runs them all, each in a copy of the code, and says which survived. A test
holds that each still applies; one that does not any more is written anew for the code as it is.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = ("src", "kernels")


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Args:
        patch: Its file.
        killer: Path of the test file, perhaps with `::` and a test, or a case of one.
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

        Lines around the fault may have changed since: as many are asked for as tell its place.

        Args:
            root: Holds `src` and `kernels`.
            check: Change nothing.
        """
        path = root / self.target
        code = path.read_text() if path.is_file() else ""
        for around in (2, 1, 0):
            old, new = self._hunk(around)
            if old and code.count(old) == 1:
                if not check:
                    path.write_text(code.replace(old, new))
                return ""
        return f"{self.name} does not apply: what it changes is not in {self.target}, or twice"

    def _hunk(self, around: int) -> tuple[str, str]:
        """The one hunk as text before and behind, with so many lines around what changes."""
        lines = self.patch.read_text().partition("\n@@")[2].splitlines(keepends=True)[1:]
        changed = [place for place, line in enumerate(lines) if not line.startswith(" ")]
        part = lines[max(0, changed[0] - around) : changed[-1] + around + 1]
        old, new = ("".join(x[1:] for x in part if x[0] in f" {sign}") for sign in "-+")
        return old, new


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
