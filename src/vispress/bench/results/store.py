"""A results folder: one file a cell, whole or absent; one run at a time; never two plans mixed.

A run may be several processes: the first opens the folder, all claim cells. Locks are the operating
system's and end with their process, so a killed one leaves none behind.
"""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vispress.bench.results.shards import Shard
from vispress.errors import VispressError

MANIFEST = "run.json"
ALONE = Shard()
_IDENTITY = ("plan", "commit", "version", "weights")


class ResultsError(VispressError, OSError):
    """A results folder cannot be used: not writable, in use, or of another plan or commit."""


class ResultsFolder:
    """Cells that a run has finished; made by `open_results`.

    Args:
        path: The folder.
        identity: What every cell in it must have been made by.
        shared: Whether other processes of the run write to it.
    """

    def __init__(self, path: Path, identity: dict[str, Any], *, shared: bool = False) -> None:
        self.path = path
        self.identity = identity
        self.shared = shared

    def read(self, key: str) -> dict[str, Any] | None:
        """A finished cell, or None."""
        data = _read_json(self.path / "cells" / f"{key}.json")
        same = data is not None and data.get("key") == key and data.get("identity") == self.identity
        return data if same else None

    def write(self, key: str, data: dict[str, Any]) -> None:
        """Store a finished cell in one step.

        Raises:
            ResultsError: The disk is full or the folder is gone; finished cells stay.
        """
        full = {"key": key, "identity": self.identity, **data}
        write_json(self.path / "cells" / f"{key}.json", full)

    @contextmanager
    def claimed(self, key: str, *, wait: bool) -> Iterator[bool]:
        """Hold a cell against the other processes of the run.

        Args:
            key: The cell.
            wait: Until no other process holds it; else False is yielded where one does.

        Raises:
            ResultsError: The claim cannot be written.
        """
        lock = _lock(self.path / ".claims" / f"{key}.lock", timeout=-1 if wait else 0)
        if not self.shared:
            yield True
        elif not _acquired(lock):
            yield False
        else:
            try:
                yield True
            finally:
                lock.release()


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
        manifest: Stored beside the identity, for readers.
        force: Move results of another identity to `previous-N/` in place of refusing.
        shard: Which process of the run this is.

    Raises:
        ResultsError: The folder is in use, of another identity, or not writable.
    """
    with ExitStack() as stack:
        if shard.leader:
            try:
                stack.enter_context(_opened(path, identity, manifest, force))
            except ResultsError as error:
                shard.tell(str(error))
                raise
            shard.tell(None)
        else:
            stack.enter_context(_joined(path, identity, shard))
        yield ResultsFolder(path, identity, shared=shard.world > 1)


@contextmanager
def _joined(path: Path, identity: dict[str, Any], shard: Shard) -> Iterator[None]:
    """Enter a folder that the first process of the run has opened."""
    if (problem := shard.hear()) is not None:
        raise ResultsError(problem)
    known = (_read_json(path / MANIFEST) or {}).get("identity")
    if known != identity:
        raise ResultsError(
            f"process {shard.rank} does not find the run of process 0 in {path}: all processes "
            "must see one folder, and run one commit, plan and model"
        )
    lock = _lock(path / f".lock-{shard.rank}", timeout=0)
    if not _acquired(lock):
        raise ResultsError(f"another process {shard.rank} works on {path}; give each its own RANK")
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _opened(
    path: Path, identity: dict[str, Any], manifest: dict[str, Any], force: bool
) -> Iterator[None]:
    """Lock the folder, and see that it is this run's."""
    try:
        (path / "cells").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot("make the folder", path, error) from error
    with _locked(path):
        known = _read_json(path / MANIFEST)
        known_identity = None if known is None else known.get("identity")
        if known_identity is not None and known_identity != identity:
            if not force:
                raise ResultsError(_foreign(path, known_identity, identity))
            _move_aside(path)
        for rest in (*path.glob("*.tmp"), *(path / "cells").glob("*.tmp")):
            rest.unlink(missing_ok=True)
        if known_identity != identity:
            write_json(path / MANIFEST, {"identity": identity, **manifest})
        yield


def read_results(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Manifest and finished cells of a folder, in the order of the plan.

    Raises:
        ResultsError: The folder holds no run.
    """
    manifest = _read_json(path / MANIFEST)
    if manifest is None:
        raise ResultsError(f"{path} holds no results: {MANIFEST} is missing or damaged")
    folder = ResultsFolder(path, manifest["identity"])
    found = (folder.read(cell["key"]) for cell in manifest["plan"]["cells"])
    return manifest, [cell for cell in found if cell is not None]


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file so that a reader sees all of it or none.

    Raises:
        ResultsError: It cannot be written.
    """
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """As `write_json`, for any text."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)  # noqa: PTH105  (the atomic one)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _cannot("write", path, error) from error


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    owner, lock = path / ".owner", _lock(path / ".lock", timeout=0)
    if not _acquired(lock):
        raise _in_use(path)
    try:
        # processes of a run whose first one was killed
        for other in path.glob(".lock-*"):
            rest = _lock(other, timeout=0)
            if not _acquired(rest):
                raise _in_use(path)
            rest.release()
        write_json(owner, {"pid": os.getpid(), "host": socket.gethostname()})
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _lock(path: Path, *, timeout: float) -> FileLock:
    return FileLock(path, timeout=timeout, thread_local=False)


def _acquired(lock: FileLock) -> bool:
    """Take a lock; False where another process holds it.

    Raises:
        ResultsError: It cannot be written.
    """
    path = Path(lock.lock_file)
    try:
        path.parent.mkdir(exist_ok=True)
        lock.acquire()
    except Timeout:
        return False
    except OSError as error:
        raise _cannot("lock", path.parent, error) from error
    return True


def _in_use(path: Path) -> ResultsError:
    who = _read_json(path / ".owner") or {}
    return ResultsError(
        f"another run holds {path} (process {who.get('pid', '?')} on {who.get('host', '?')}); "
        "wait for it or choose another folder"
    )


def _foreign(path: Path, known: dict[str, Any], identity: dict[str, Any]) -> str:
    differs = [
        f"{name} {known.get(name)} (now {identity.get(name)})"
        for name in _IDENTITY
        if known.get(name) != identity.get(name)
    ]
    return (
        f"{path} holds results of another run: {', '.join(differs)}. Choose another folder, or use "
        "--force to move them to previous-N/ and start anew"
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
        raise _cannot("move aside", path, error) from error


def _cannot(what: str, path: Path, error: OSError) -> ResultsError:
    return ResultsError(
        f"cannot {what} {path}: {error.strerror or error}. Finished cells are safe; the same "
        "command goes on from there"
    )
