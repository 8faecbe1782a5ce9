"""A results folder: one file a cell, whole or absent; one run at a time; never two plans mixed.

A run may be several processes: the first opens the folder, all claim cells. What is read is checked
(`stored`): a damaged cell is made anew by a run and refused by every reader.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
from vispress.bench.results.locks import hold, taken
from vispress.bench.results.schema import plain_fault
from vispress.bench.results.shards import Shard
from vispress.bench.results.stored import cell_fault, folder_fault, identity_of, manifest_fault

MANIFEST = "run.json"
ALONE = Shard()
_MEND = "the same command as before mends it and keeps its cells; --force starts anew"
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


@contextmanager
def open_results(
    path: Path,
    identity: dict[str, Any],
    manifest: dict[str, Any],
    *,
    force: bool = False,
    shard: Shard = ALONE,
) -> Iterator[ResultsFolder]:
    """Hold the folder for one run; several processes of a run enter together.

    Args:
        path: Created if missing.
        identity: Plan hash, commit, version and weights; a folder with another one is refused.
        manifest: Stored beside the identity, for readers: plan, task cards and time.
        force: Move results of another identity to `previous-N/` in place of refusing.
        shard: Which process of the run this is.

    Raises:
        ResultsError: The folder is in use, of another identity, or not writable; or the plan cannot
            be stored.
    """
    full = {"identity": identity, **manifest}
    with ExitStack() as stack:
        if shard.leader:
            try:
                stack.enter_context(_opened(path, full, force))
            except ResultsError as error:
                shard.tell(str(error))
                raise
            shard.tell(None)
        else:
            stack.enter_context(_joined(path, identity, shard))
        yield ResultsFolder(path, full, shared=shard.world > 1)


@contextmanager
def _joined(path: Path, identity: dict[str, Any], shard: Shard) -> Iterator[None]:
    """Enter a folder that the first process of the run has opened."""
    if (problem := shard.hear()) is not None:
        raise ResultsError(problem)
    known = _load_manifest(path)
    if known is None or known["identity"] != identity:
        raise ResultsError(
            f"process {shard.rank} does not find the run of process 0 in {path}: all processes "
            "must see one folder, and run one commit, plan and model"
        )
    with taken(path / f".lock-{shard.rank}") as mine:
        if not mine:
            raise ResultsError(
                f"another process {shard.rank} works on {path}; give each its own RANK"
            )
        yield


@contextmanager
def _opened(path: Path, full: dict[str, Any], force: bool) -> Iterator[None]:
    """Lock the folder, and see that it is this run's."""
    if (fault := plain_fault(full) or manifest_fault(full)) is not None:
        raise ResultsError(f"a run of this plan cannot be stored: {fault}")
    try:
        (path / "cells").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot("make the folder", path, error) from error
    with hold(path):
        stored, problem = _found(path, full)
        if problem is not None:
            if not force:
                raise ResultsError(
                    f"{problem}. Choose another folder, or use --force to move what is there to "
                    "previous-N/ and start anew"
                )
            _move_aside(path)
            stored = None
        try:
            for rest in (*path.glob("*.[0-9]*.tmp"), *(path / "cells").glob("*.[0-9]*.tmp")):
                rest.unlink(missing_ok=True)
        except OSError as error:
            raise cannot("clean", path, error) from error
        if stored is None or {**stored, "created": full["created"]} != full:
            # run.json is missing, damaged, or says of the tasks what another commit said
            write_json(path / MANIFEST, full | {"created": (stored or full)["created"]})
        yield


def _found(path: Path, full: dict[str, Any]) -> tuple[dict[str, Any] | None, str | None]:
    """The folder's `run.json` where it is sound, and why the folder is not this run's."""
    damage = None
    try:
        stored = _load_manifest(path)
    except DamagedFileError as error:
        stored, damage = None, str(error).removesuffix(f"; {_MEND}")
    identity = full["identity"]
    if stored is not None and stored["identity"] == identity:
        return stored, None
    # cells say whose the folder is: another plan must not write over them
    owners = [_owner(file) for file in sorted((path / "cells").glob("*.json"))]
    owners = [owner for owner in owners if owner is not None] or [_owner(path / MANIFEST)]
    foreign = [owner for owner in owners if owner is not None and owner != identity]
    if foreign:
        return None, f"{path} holds results of another run: {_differences(foreign[0], identity)}"
    return None, damage if None in owners else None


def read_manifest(path: Path) -> dict[str, Any]:
    """What `run.json` says.

    Raises:
        ResultsError: There is none, or it is damaged.
    """
    manifest = _load_manifest(path)
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


def _load_manifest(path: Path) -> dict[str, Any] | None:
    """A sound `run.json`; None where there is none."""

    def check(data: dict[str, Any]) -> str | None:
        fault, known = manifest_fault(data), identity_of(data)
        if fault is None or known is None or known["version"] == vispress.__version__:
            return fault
        return f"{fault} (vispress {known['version']} wrote it, this is {vispress.__version__})"

    return load_json(path / MANIFEST, check, _MEND)


def _load_cell(path: Path, key: str, manifest: dict[str, Any]) -> dict[str, Any] | None:
    """A sound cell of the run; None where there is none."""
    identity = manifest["identity"]

    def check(data: dict[str, Any]) -> str | None:
        known = identity_of(data)
        if known is not None and known != identity:
            differs = _differences(known, identity)
            return (
                f"it is of another run than {MANIFEST} ({differs}); where all cells say so, "
                f"{MANIFEST} is wrong, and its own command mends it"
            )
        return cell_fault(data, key, manifest)

    return load_json(_path_of(path, key), check, _AGAIN)


def _owner(path: Path) -> dict[str, Any] | None:
    """Whose run a file is of, as far as it can be told."""
    try:
        data = load_json(path, lambda _: None, "")
    except DamagedFileError:
        return None
    return None if data is None else identity_of(data)


def _path_of(path: Path, key: str) -> Path:
    return path / "cells" / f"{key}.json"


def _differences(known: dict[str, Any], identity: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {known[name]} in place of {value}"
        for name, value in identity.items()
        if known[name] != value
    )


def _move_aside(path: Path) -> None:
    number = 1
    while (aside := path / f"previous-{number}").exists():
        number += 1
    try:
        aside.mkdir()
        for item in list(path.iterdir()):
            if not item.name.startswith((".", "previous-")):
                item.rename(aside / item.name)
        (path / "cells").mkdir()
    except OSError as error:
        raise cannot("move aside", path, error) from error
