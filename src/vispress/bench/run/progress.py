"""A progress bar with the time that remains; one line a cell where the output is no terminal."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from vispress.bench.plan.plan import Plan
from vispress.bench.run.parts import Advance


@contextmanager
def progress_bar(plan: Plan, console: Console, *, processes: int = 1) -> Iterator[Advance]:
    """Show how many questions of a plan are answered; yields what `run` calls.

    Args:
        plan: What is run.
        console: Where to.
        processes: How many answer.
    """
    total = len(plan.cells()) * len(plan.tasks) * plan.questions
    with counting(total, console, processes=processes) as advance:
        yield advance


@contextmanager
def counting(total: int, console: Console, *, processes: int = 1) -> Iterator[Advance]:
    """Show how many of a number of questions are answered; yields what `run` calls.

    Args:
        total: Questions, at most.
        console: Where to.
        processes: How many answer.
    """
    if not console.is_terminal:
        yield _Lines(console, total, processes)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("questions,"),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    # timing leaves pauses of several seconds between questions
    with Progress(*columns, console=console, speed_estimate_period=120) as progress:
        bar = progress.add_task("starting", total=total)

        def advance(what: str, questions: int) -> None:
            progress.update(bar, advance=questions, description=f"{what:<28.28}")

        yield advance


class _Lines:
    """Progress for log files: a line when a cell begins."""

    def __init__(self, console: Console, total: int, processes: int) -> None:
        self._console = console
        self._total, self._processes = total, processes
        self._done = self._asked = 0
        self._cell = ""
        self._start = time.monotonic()

    def __call__(self, what: str, questions: int) -> None:
        cell = what.partition(",")[0]
        if cell != self._cell:
            self._cell = cell
            self._console.print(f"{self._done}/{self._total} questions{self._left()}; now {cell}")
        self._done += questions
        # a cell found finished is no measure of speed
        self._asked += questions if "," in what else 0

    def _left(self) -> str:
        if not self._asked:
            return ""
        rate = (time.monotonic() - self._start) / self._asked / self._processes
        return f", {rate * (self._total - self._done) / 60:.1f} minutes left"
