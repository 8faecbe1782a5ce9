"""A progress bar with the time that remains."""

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

from vispress.bench.engine import Advance
from vispress.bench.plan import Plan


@contextmanager
def progress_bar(plan: Plan, console: Console) -> Iterator[Advance]:
    """Show how many questions of a plan are answered; yields what `run` calls."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("questions,"),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    total = len(plan.cells()) * len(plan.tasks) * plan.questions
    # timing leaves pauses of several seconds between questions
    with Progress(*columns, console=console, speed_estimate_period=120) as progress:
        bar = progress.add_task("starting", total=total)

        def advance(what: str, questions: int) -> None:
            progress.update(bar, advance=questions, description=f"{what:<28.28}")

        yield advance
