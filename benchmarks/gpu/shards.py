"""Rows measured in parallel processes, a shard each, and reported back one by one.

Nothing here imports torch: what a process needs, its work imports.
"""

import multiprocessing as mp
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu.record import Part

Work = Callable[[str, Sequence[str]], Iterable[dict[str, Any]]]
"""Gives the rows of a shard in order: of the names asked for, each with its `name`."""
CRASHES = 3
"""Processes of one shard that may die before the rest of it is given up."""


class _Worker:
    """A process and what it still owes."""

    def __init__(self, work: Work, shard: str, names: Sequence[str]) -> None:
        self.shard, self.owed = shard, list(names)
        context = mp.get_context("spawn")
        self.pipe, other = context.Pipe(duplex=False)
        self.process = context.Process(
            target=_serve, args=(other, work, shard, self.owed), daemon=True
        )
        with _single_threaded():
            self.process.start()
        other.close()


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Processes that start inside use one thread (read when they import torch)."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


def _serve(pipe: Connection, work: Work, shard: str, names: Sequence[str]) -> None:
    for row in work(shard, names):
        pipe.send(row)
    pipe.close()


def run_shards(part: "Part", shards: Mapping[str, Sequence[str]], work: Work, workers: int) -> None:
    """Rows of all shards into the part, until its deadline.

    A process that dies makes the row it was at an error; another goes on behind it. A process may
    also end early by itself (a device that is no longer usable); another goes on.

    Args:
        part: Gets the rows as they come; what it has already is not measured.
        shards: Names of rows, by shard.
        work: Runs in the processes: a module's function.
        workers: Processes at a time.
    """
    waiting = [(shard, _missing(part, names)) for shard, names in shards.items()]
    waiting = [(shard, names) for shard, names in waiting if names]
    crashes = dict.fromkeys(shards, 0)
    running: list[_Worker] = []
    try:
        while (waiting or running) and not part.deadline.passed:
            while waiting and len(running) < workers:
                running.append(_Worker(work, *waiting.pop(0)))
            ready = wait([worker.pipe for worker in running], timeout=part.deadline.left)
            for worker in [each for each in running if each.pipe in ready]:
                if _receive(part, worker):
                    continue
                running.remove(worker)
                if _ended(part, worker, crashes):
                    waiting.insert(0, (worker.shard, worker.owed))
    finally:
        for worker in running:
            worker.process.kill()
            worker.process.join()
    part.not_reached += [name for names in shards.values() for name in _missing(part, names)]


def _missing(part: "Part", names: Sequence[str]) -> list[str]:
    return [name for name in names if part.find(name) is None]


def _receive(part: "Part", worker: _Worker) -> bool:
    """Take one row; whether there was one."""
    try:
        row = worker.pipe.recv()
    except (EOFError, OSError):
        return False
    worker.owed.remove(row["name"])
    part.add(row)
    return True


def _ended(part: "Part", worker: _Worker, crashes: dict[str, int]) -> bool:
    """Note how a process ended; whether another should go on with what it owes."""
    worker.pipe.close()
    worker.process.join()
    if not worker.owed:
        return False
    code = worker.process.exitcode
    crashes[worker.shard] += 1
    if code != 0:
        name = worker.owed.pop(0)
        part.add({"name": name, "error": f"the process died with exit code {code}", "took_s": 0.0})
    return bool(worker.owed) and crashes[worker.shard] < CRASHES


def workers_for(most: int) -> int:
    """As many processes as there are processors, up to `most`."""
    return max(1, min(most, os.cpu_count() or 1))
