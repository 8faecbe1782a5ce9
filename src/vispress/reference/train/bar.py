"""A progress bar for the training loops."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

Update = Callable[[float, dict[str, float]], None]


@contextmanager
def progress_bar(stage: str, *, visible: bool) -> Iterator[Update]:
    """Show how much of a stage's budget is spent.

    Args:
        stage: Name in front of the bar.
        visible: `False` shows nothing.

    Yields:
        A function of the share spent, in `[0, 1]`, and of numbers to show (kept until replaced).
    """
    columns = (
        TextColumn(stage),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    with Progress(*columns, disable=not visible, refresh_per_second=1) as progress:
        task = progress.add_task(stage, total=1.0, numbers="")

        def update(share: float, numbers: dict[str, float]) -> None:
            progress.update(task, completed=min(1.0, share))
            if numbers:
                shown = " ".join(f"{key} {value:.3f}" for key, value in numbers.items())
                progress.update(task, numbers=shown)

        yield update
