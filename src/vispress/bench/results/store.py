"""A results folder: one file a cell, whole or absent; one run at a time; never two plans mixed.

A run may be several processes: the first opens the folder, all claim cells. What is read is checked
(`stored`): a damaged cell is made anew by a run and refused by every reader.
"""

import glob
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import vispress
from vispress.bench.results.files import (
    DamagedFileError,
    ResultsError,
    cannot,
    load_json,
    write_json,
)
from vispress.bench.results.locks import taken
from vispress.bench.results.schema import plain_fault
from vispress.bench.results.stored import cell_fault, folder_fault, identity_of, manifest_fault

MANIFEST = "run.json"
_PARTS = ".parts"
MEND = "the same command as before mends it and keeps its cells; --force starts anew"
_AGAIN = "delete it and run the benchmark again: only this cell is made anew"


class ResultsFolder:
    """Cells that a run has finished; made by `open_results`.

    Args:
        path: The folder.
        manifest: What its `run.json` holds; cells must be of it.
        shared: Whether other processes of the run write to it.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], *, shared: bool = False) -> None:
        self.path = path
        self.manifest = manifest
        self.shared = shared

    def read(self, key: str) -> dict[str, Any] | None:
        """A finished cell; None where it is missing, damaged or of another run: to be made anew.

        Raises:
            ResultsError: It is there and cannot be read.
        """
        try:
            return _load_cell(self.path, key, self.manifest)
        except DamagedFileError:
            return None

    def write(self, key: str, data: dict[str, Any]) -> None:
        """Store a finished cell in one step.

        Raises:
            ResultsError: The disk is full or the folder is gone; finished cells stay. Or the cell
                is none that could be read again: a task's score or a method is at fault.
        """
        full = {"key": key, "identity": self.manifest["identity"], **data}
        if (fault := plain_fault(full) or cell_fault(full, key, self.manifest)) is not None:
            raise ResultsError(f"cell {key!r} cannot be stored: {fault}")
        write_json(_path_of(self.path, key), full)

    def read_part(self, key: str, number: int) -> Any:
        """Read a part of an unfinished cell; None where it is missing, damaged or of another run.

        Raises:
            ResultsError: It is there and cannot be read.
        """
        try:
            data = load_json(self._part(key, number), lambda _: None, "")
        except DamagedFileError:
            return None
        mine = data is not None and data.get("identity") == self.manifest["identity"]
        return data.get("batches") if data is not None and mine else None

    def write_part(self, key: str, number: int, batches: list[dict[str, Any]]) -> None:
        """Store a part of an unfinished cell in one step.

        Raises:
            ResultsError: The disk is full or the folder is gone.
        """
        path = self._part(key, number)
        try:
            path.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise cannot("make the folder", path.parent, error) from error
        write_json(path, {"identity": self.manifest["identity"], "batches": batches})

    def drop_parts(self, key: str) -> None:
        """Remove the parts of a cell that is finished."""
        for path in self.path.glob(f"{_PARTS}/{glob.escape(key)}.part*.json"):
            with suppress(OSError):
                path.unlink()

    def _part(self, key: str, number: int) -> Path:
        return self.path / _PARTS / f"{key}.part{number}.json"

    @contextmanager
    def claimed(self, key: str, *, wait: bool) -> Iterator[bool]:
        """Hold a cell against the other processes of the run.

        Args:
            key: The cell.
            wait: Until no other process holds it; else False is yielded where one does.

        Raises:
            ResultsError: The claim cannot be written.
        """
        if not self.shared:
            yield True
            return
        with taken(self.path / ".claims" / f"{key}.lock", wait=wait) as mine:
            yield mine


def read_manifest(path: Path) -> dict[str, Any]:
    """What `run.json` says.

    Raises:
        ResultsError: There is none, or it is damaged.
    """
    manifest = load_manifest(path)
    if manifest is None:
        raise ResultsError(
            f"{path} holds no results: {MANIFEST} is missing; `vispress bench PLAN --out {path}` "
            "makes them"
        )
    return manifest


def read_results(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Manifest and finished cells of a folder, in the order of the plan.

    Raises:
        ResultsError: The folder holds no run, or a file in it is damaged or of another run.
    """
    manifest = read_manifest(path)
    found = (_load_cell(path, cell["key"], manifest) for cell in manifest["plan"]["cells"])
    cells = [cell for cell in found if cell is not None]
    if (fault := folder_fault(cells)) is not None:
        raise DamagedFileError(
            f"two cells of {path} contradict each other: {fault}; delete the one that is damaged "
            "and run the benchmark again: only this cell is made anew"
        )
    return manifest, cells


def load_manifest(path: Path) -> dict[str, Any] | None:
    """Read a sound `run.json`; None where there is none.

    Raises:
        DamagedFileError: It is there, and damaged.
    """

    def check(data: dict[str, Any]) -> str | None:
        fault, known = manifest_fault(data), identity_of(data)
        if fault is None or known is None or known["version"] == vispress.__version__:
            return fault
        return f"{fault} (vispress {known['version']} wrote it, this is {vispress.__version__})"

    return load_json(path / MANIFEST, check, MEND)


def _load_cell(path: Path, key: str, manifest: dict[str, Any]) -> dict[str, Any] | None:
    """A sound cell of the run; None where there is none."""
    identity = manifest["identity"]

    def check(data: dict[str, Any]) -> str | None:
        known = identity_of(data)
        if known is not None and known != identity:
            differs = differences(known, identity)
            return (
                f"it is of another run than {MANIFEST} ({differs}); where all cells say so, "
                f"{MANIFEST} is wrong, and its own command mends it"
            )
        return cell_fault(data, key, manifest)

    return load_json(_path_of(path, key), check, _AGAIN)


def _path_of(path: Path, key: str) -> Path:
    return path / "cells" / f"{key}.json"


def differences(known: dict[str, Any], identity: dict[str, Any]) -> str:
    """Say in which an identity is another one."""
    return ", ".join(
        f"{name} {known[name]} in place of {value}"
        for name, value in identity.items()
        if known[name] != value
    )
