"""Locks of a results folder: the operating system's, so a killed process leaves none behind."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from vispress.bench.results.files import ResultsError, cannot, load_json, write_json


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
