"""What a results folder holds, read strictly: a damaged cell is never shown as a missing one."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vispress
from vispress.bench.plan.cells import UNCOMPRESSED
from vispress.bench.results.store import MANIFEST, ResultsError
from vispress.bench.results.summary import Summary, summarise

Stored = Mapping[str, Any]


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
        ResultsError: It holds no run, a file in it is damaged or of another run, or another version
            of vispress wrote it.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise ResultsError(
            f"{folder} holds no results: {MANIFEST} is missing; `vispress bench PLAN --out "
            f"{folder}` makes them"
        )
    manifest = _load(folder / MANIFEST, "start the benchmark anew with --force")
    try:
        planned = [cell["key"] for cell in manifest["plan"]["cells"]]
        cards = [manifest["tasks"][name] for name in manifest["plan"]["tasks"]]
        written = manifest["identity"]["version"]
        sound = all({"chance", "needs"} <= set(card) for card in cards)
    except (KeyError, TypeError) as error:
        raise _damaged(folder / MANIFEST, f"no {error}", "start anew with --force") from error
    if not sound:
        raise _damaged(folder / MANIFEST, "a task has no card", "start anew with --force")
    if written != vispress.__version__:
        raise ResultsError(
            f"{folder} holds results of vispress {written}, this is {vispress.__version__}: make "
            "the page with that version, or run the benchmark again with this one"
        )
    cells, missing = [], []
    for key in planned:
        if (path := folder / "cells" / f"{key}.json").is_file():
            cells.append(_cell(path, key, manifest))
        else:
            missing.append(key)
    summary = summarise(folder)
    return Results(manifest=manifest, cells=tuple(cells), missing=tuple(missing), summary=summary)


def _cell(path: Path, key: str, manifest: Stored) -> Stored:
    """One cell, refused unless it is whole and of this run."""
    again = "delete it and run the benchmark again: only this cell is made anew"
    data = _load(path, again)
    if data.get("key") != key:
        raise _damaged(path, f"it says it is {data.get('key')!r}", again)
    identity = manifest["identity"]
    if data.get("identity") != identity:
        found = data.get("identity")
        found = found if isinstance(found, dict) else {}
        differs = ", ".join(
            f"{name} {found.get(name)} in place of {value}"
            for name, value in identity.items()
            if found.get(name) != value
        )
        raise ResultsError(f"{path} is of another run ({differs}); {again}")
    if "refused" not in data:
        for name in manifest["plan"]["tasks"]:
            if (reason := _task_fault(data, name, manifest["plan"]["questions"])) is not None:
                raise _damaged(path, f"task {name}: {reason}", again)
    for name in ("cell", "provenance"):
        if not isinstance(data.get(name), dict):
            raise _damaged(path, f"no {name!r}", again)
    return data


def _task_fault(data: Stored, name: str, questions: int) -> str | None:
    try:
        task = data["tasks"][name]
        right, answers = task["right"], task["answers"]
        kept = data["kept"]["kept_mean_over_layers"]
    except (KeyError, TypeError) as error:
        return f"no {error}"
    if not len(right) == len(answers) == questions:
        return f"{len(right)} marks and {len(answers)} answers for {questions} questions"
    return None if isinstance(kept, int | float) else f"kept {kept!r} tokens"


def _load(path: Path, remedy: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error), remedy) from error
    if not isinstance(data, dict):
        raise _damaged(path, "it is no JSON object", remedy)
    return data


def _damaged(path: Path, reason: str, remedy: str) -> ResultsError:
    return ResultsError(f"{path} is damaged: {reason}; {remedy}")
