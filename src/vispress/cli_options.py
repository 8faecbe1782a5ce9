"""What the commands share: common options, the console, and checks before anything runs."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vispress.errors import ConfigError

_EXTRA = ("jinja2", "matplotlib", "PIL", "sklearn")

Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1.")]
Force = Annotated[bool, typer.Option(help="Move results of another plan or commit aside.")]
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


def check_file(out: Path) -> None:
    """Refuse, ahead of all work, a file that could not be written behind it.

    Raises:
        ConfigError: It is a folder, or its folder does not exist.
    """
    if out.is_dir() or not out.absolute().parent.is_dir():
        why = "it is a folder" if out.is_dir() else "its folder does not exist"
        raise ConfigError(f"cannot write {out}: {why}")


def terminal() -> Console:
    """Wide enough for tables where the output is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=max(140, console.width))


def prepare() -> None:
    """Refuse early what would fail late, and silence transformers' own bars and advice."""
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} missing; run: pip install 'vispress[bench]'")
    quiet()


def quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
