"""What the commands share: common options, the console, and checks before anything runs."""

import os
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.progress import track

from vispress.bench.model.names import check_model_name
from vispress.budget import check_ratio
from vispress.errors import ConfigError
from vispress.extras import BENCH, check_packages
from vispress.registry import ENTRY_POINT_GROUP, check_known
from vispress.yaml_files import shipped_files

T = TypeVar("T")

Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1.")]
Force = Annotated[bool, typer.Option(help="Move results of another plan or commit aside.")]
Imports = Annotated[
    list[Path] | None,
    typer.Option("--import", metavar="FILE", help="Python that registers methods; repeat."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Model = Annotated[
    str | None,
    typer.Option(
        help="'reference', 'reference-qwen', a checkpoint's folder, or a hub id (org/name)."
    ),
]

Data = Annotated[
    str | None,
    typer.Option(
        help="A folder of pictures, a .jsonl file with 'image' and 'question' (and 'answer') in "
        "each line, or a task's name; by default the reference model's own scenes."
    ),
]
Asked = Annotated[
    list[str] | None,
    typer.Option("--question", help="Asked of a folder's pictures in turn; repeat."),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="KEY=VALUE, a hyper-parameter (YAML).")
]
Loaded = Annotated[str, typer.Option(help="As in `vispress bench`.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts a batch.")]
Precision = Annotated[str, typer.Option(help="Of the weights: fp32, bf16 or fp16.")]


def tracked(items: Iterable[T], total: int, what: str, console: Console) -> Iterator[T]:
    """Pass items on, with a bar and the time that remains on a terminal.

    Args:
        items: Any.
        total: How many, at most.
        what: What is done with them.
        console: Where the bar is drawn.
    """
    hidden = not console.is_terminal
    yield from track(items, what, total, console=console, transient=True, disable=hidden)


def check_file(out: Path) -> None:
    """Refuse, ahead of all work, a file that could not be written behind it.

    Raises:
        ConfigError: It is a folder, or its folder does not exist.
    """
    if out.is_dir() or not out.absolute().parent.is_dir():
        why = "it is a folder" if out.is_dir() else "its folder does not exist"
        raise ConfigError(f"cannot write {out}: {why}")


def terminal() -> Console:
    """Wide enough for tables where the output is no terminal, unless `COLUMNS` says how wide."""
    console = Console()
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return Console(width=max(140, console.width))


def check_early(
    *, methods: Sequence[str] = (), model: str | None = None, keep_ratio: float | None = None
) -> None:
    """Refuse in a moment what would be refused behind seconds of imports.

    Names of methods are looked up among the shipped configurations, one each; where a package
    brings methods of its own, only the registry knows.

    Raises:
        UnsupportedMethodError: Unknown method.
        ConfigError: Nothing is a model of that name.
        BudgetError: The share is out of range.
    """
    if not entry_points(group=ENTRY_POINT_GROUP):
        for name in methods:
            check_known(name, shipped_files("methods"))
    if model is not None:
        check_model_name(model)
    if keep_ratio is not None:
        check_ratio("keep_ratio", keep_ratio)


def prepare() -> None:
    """Refuse early what would fail late, and silence transformers' own bars and advice."""
    check_packages(BENCH, "this command")
    quiet()


def quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
