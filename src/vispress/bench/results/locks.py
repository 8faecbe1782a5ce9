"""Locks of a results folder: the operating system's, so a killed process leaves none behind."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout

from vispress.bench.results.files import ResultsError, cannot, load_json, write_json

_GATE = 60.0
"""Seconds that a run waits for others that enter the same folder."""


@contextmanager
def hold(path: Path) -> Iterator[None]:
    """Keep a folder for one run.

    Raises:
        ResultsError: Another run has it, or it is not writable.
    """
    owner, lock = path / ".owner", FileLock(path / ".lock", timeout=0, thread_local=False)
    if not _acquired(lock):
        raise _in_use(path)
    try:
        # processes of a run whose first one was killed
        for other in path.glob(".lock-*"):
            with taken(other) as free:
                if not free:
                    raise _in_use(path)
        write_json(owner, {"pid": os.getpid(), "host": socket.gethostname()})
        yield
    finally:
        # a disk that has become read-only must not hide the error that says so
        with suppress(OSError):
            owner.unlink()
        lock.release()


class Joined:
    """A place among the runs that share a folder, and whether there are others.

    Args:
        path: The folder.
        gate: Held until `enter`, so that runs come in one after another.
    """

    def __init__(self, path: Path, gate: FileLock) -> None:
        self._gate = gate
        self.others = False
        for other in path.glob(".lock-*"):
            with taken(other) as free:
                if free:  # of a run that ended or was killed
                    with suppress(OSError):
                        other.unlink()
                self.others |= not free
        who = f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}"
        self.place = path / f".lock-{who}"
        self._lock = FileLock(self.place, timeout=0, thread_local=False)
        _acquired(self._lock)

    def enter(self) -> None:
        """Let the next one come."""
        self._gate.release()

    def leave(self) -> None:
        """Give the place up."""
        self._gate.release()
        self._lock.release()
        with suppress(OSError):
            self.place.unlink()


@contextmanager
def joined(path: Path) -> Iterator[Joined]:
    """Take a place in a folder that several runs share; its `enter` is to be called.

    Raises:
        ResultsError: A run that shares it with nobody has it, or it is not writable.
    """
    gate = FileLock(path / ".lock", timeout=_GATE, thread_local=False)
    if not _acquired(gate):
        raise _in_use(path)
    place = None
    try:
        place = Joined(path, gate)
        yield place
    finally:
        if place is not None:
            place.leave()
        gate.release()


@contextmanager
def taken(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold a lock file; False is yielded where another process does.

    Args:
        path: The file; made if missing.
        wait: Until no other process holds it.

    Raises:
        ResultsError: It cannot be written.
    """
    lock = FileLock(path, timeout=-1 if wait else 0, thread_local=False)
    if not _acquired(lock):
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _acquired(lock: FileLock) -> bool:
    path = Path(lock.lock_file)
    try:
        path.parent.mkdir(exist_ok=True)
        lock.acquire()
    except Timeout:
        return False
    except OSError as error:
        raise cannot("lock", path.parent, error) from error
    return True


def _in_use(path: Path) -> ResultsError:
    try:
        who = load_json(path / ".owner", lambda _: None, "") or {}
    except ResultsError:
        who = {}
    return ResultsError(
        f"another run holds {path} (process {who.get('pid', '?')} on {who.get('host', '?')}); "
        "wait for it or choose another folder"
    )
