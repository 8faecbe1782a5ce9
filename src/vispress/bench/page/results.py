"""A results folder as the page asks for it."""

from dataclasses import dataclass
from pathlib import Path

import vispress
from vispress.bench.plan.cells import UNCOMPRESSED
from vispress.bench.results.files import ResultsError
from vispress.bench.results.store import read_manifest, read_results
from vispress.bench.results.stored import Stored
from vispress.bench.results.summary import Summary, summary_of

READABLE = ("0.1.0",)
"""Earlier versions whose results have the form of this one's."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """A results folder.

    Args:
        manifest: `run.json`.
        cells: Finished cells, in the order of the plan; refused ones among them.
        missing: Names of cells that are not finished.
        summary: Rows and comparisons of the finished ones.
    """

    manifest: Stored
    cells: tuple[Stored, ...]
    missing: tuple[str, ...]
    summary: Summary

    @property
    def plan(self) -> Stored:
        """The plan as stored, with its cells spelt out."""
        plan: Stored = self.manifest["plan"]
        return plan

    @property
    def answered(self) -> tuple[Stored, ...]:
        """Cells with answers: finished and not refused."""
        return tuple(cell for cell in self.cells if "refused" not in cell)

    @property
    def baseline(self) -> Stored | None:
        """The uncompressed model's cell, where it is finished."""
        return next((c for c in self.answered if c["cell"]["group"] == UNCOMPRESSED), None)

    @property
    def controls(self) -> frozenset[str]:
        """Groups that are controls."""
        return frozenset(cell["group"] for cell in self.plan["cells"] if cell["control"])

    @property
    def keep_ratios(self) -> tuple[float, ...]:
        """Budgets of the plan's cells, largest first."""
        asked = {cell["keep_ratio"] for cell in self.plan["cells"]} - {None}
        return tuple(sorted(asked, reverse=True))

    @property
    def groups(self) -> tuple[str, ...]:
        """Methods and controls in the order of the plan, the uncompressed model left out."""
        names = dict.fromkeys(cell["group"] for cell in self.plan["cells"])
        return tuple(name for name in names if name != UNCOMPRESSED)


def read(folder: str | Path) -> Results:
    """Read a results folder.

    Raises:
        ResultsError: It holds no run, a file in it is damaged or of another run, or a version of
            vispress wrote it whose results this one does not read.
    """
    folder = Path(folder)
    written = read_manifest(folder)["identity"]["version"]
    if written not in {vispress.__version__, *READABLE}:
        raise ResultsError(
            f"{folder} holds results of vispress {written}, this is {vispress.__version__}: make "
            "the page with that version, or run the benchmark again with this one"
        )
    manifest, cells = read_results(folder)
    finished = {cell["key"] for cell in cells}
    missing = [cell["key"] for cell in manifest["plan"]["cells"] if cell["key"] not in finished]
    return Results(
        manifest=manifest,
        cells=tuple(cells),
        missing=tuple(missing),
        summary=summary_of(manifest, cells),
    )
