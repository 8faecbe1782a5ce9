"""Opening a results folder: by one run, by a launcher's processes, or by runs that share it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from vispress.bench.results.files import (
    DamagedFileError,
    ResultsError,
    cannot,
    load_json,
    write_json,
)
from vispress.bench.results.locks import hold, joined, taken
from vispress.bench.results.schema import plain_fault
from vispress.bench.results.shards import Shard
from vispress.bench.results.store import MANIFEST, MEND, ResultsFolder, differences, load_manifest
from vispress.bench.results.stored import identity_of, manifest_fault

ALONE = Shard()


@contextmanager
def open_results(
    path: Path,
    identity: dict[str, Any],
    manifest: dict[str, Any],
    *,
    force: bool = False,
    shard: Shard = ALONE,
    share: bool = False,
) -> Iterator[ResultsFolder]:
    """Hold the folder for one run; several processes of a run enter together.

    Args:
        path: Created if missing.
        identity: Plan hash, commit, version and weights; a folder with another one is refused.
        manifest: Stored beside the identity, for readers: plan, task cards and time.
        force: Move results of another identity to `previous-N/` in place of refusing.
        shard: Which process of the run this is.
        share: Whether other runs of the same identity may enter, at any time.

    Raises:
        ResultsError: The folder is in use, of another identity, or not writable; or the plan cannot
            be stored.
    """
    full = {"identity": identity, **manifest}
    if share and shard.world > 1:
        raise ResultsError("processes of one launcher share the folder already; leave --share out")
    with ExitStack() as stack:
        if share:
            stack.enter_context(_shared(path, full, force))
        elif shard.leader:
            try:
                stack.enter_context(_opened(path, full, force))
            except ResultsError as error:
                shard.tell(str(error))
                raise
            shard.tell(None)
        else:
            stack.enter_context(_joined(path, identity, shard))
        yield ResultsFolder(path, full, shared=share or shard.world > 1)


@contextmanager
def _joined(path: Path, identity: dict[str, Any], shard: Shard) -> Iterator[None]:
    """Enter a folder that the first process of the run has opened."""
    if (problem := shard.hear()) is not None:
        raise ResultsError(problem)
    known = load_manifest(path)
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
    _make(path, full)
    with hold(path):
        _claim(path, full, force)
        yield


@contextmanager
def _shared(path: Path, full: dict[str, Any], force: bool) -> Iterator[None]:
    """Enter a folder that other runs of the same identity may be at."""
    _make(path, full)
    with joined(path) as place:
        if place.others:
            stored, problem = _found(path, full)
            if stored is None or problem is not None:
                raise ResultsError(
                    f"{problem or f'{path} is damaged'}, and other processes are at it; stop them, "
                    "or choose another folder"
                )
        else:
            _claim(path, full, force)
        place.enter()
        yield


def _make(path: Path, full: dict[str, Any]) -> None:
    if (fault := plain_fault(full) or manifest_fault(full)) is not None:
        raise ResultsError(f"a run of this plan cannot be stored: {fault}")
    try:
        (path / "cells").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot("make the folder", path, error) from error


def _claim(path: Path, full: dict[str, Any], force: bool) -> None:
    """See that a folder that nobody else is at is this run's, and clean it."""
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
        for rest in path.glob("**/*.[0-9]*.tmp"):
            rest.unlink(missing_ok=True)
    except OSError as error:
        raise cannot("clean", path, error) from error
    if stored is None or {**stored, "created": full["created"]} != full:
        # run.json is missing, damaged, or says of the tasks what another commit said
        write_json(path / MANIFEST, full | {"created": (stored or full)["created"]})


def _found(path: Path, full: dict[str, Any]) -> tuple[dict[str, Any] | None, str | None]:
    """The folder's `run.json` where it is sound, and why the folder is not this run's."""
    damage = None
    try:
        stored = load_manifest(path)
    except DamagedFileError as error:
        stored, damage = None, str(error).removesuffix(f"; {MEND}")
    identity = full["identity"]
    if stored is not None and stored["identity"] == identity:
        return stored, None
    # cells say whose the folder is: another plan must not write over them
    owners = [_owner(file) for file in sorted((path / "cells").glob("*.json"))]
    owners = [owner for owner in owners if owner is not None] or [_owner(path / MANIFEST)]
    foreign = [owner for owner in owners if owner is not None and owner != identity]
    if foreign:
        return None, f"{path} holds results of another run: {differences(foreign[0], identity)}"
    return None, damage if None in owners else None


def _owner(path: Path) -> dict[str, Any] | None:
    """Whose run a file is of, as far as it can be told."""
    try:
        data = load_json(path, lambda _: None, "")
    except DamagedFileError:
        return None
    return None if data is None else identity_of(data)


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
