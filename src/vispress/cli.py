"""The command line. Commands are thin, and import what they need when they run."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vispress.analysis.arank import probe
from vispress.analysis.fit_debias import fit_debias
from vispress.analysis.show import show
from vispress.checks import check_choice
from vispress.cli_bench import bench, demo, join, report, reproduce
from vispress.cli_methods import methods
from vispress.cli_options import (
    Device,
    Json,
    prepare,
    quiet,
    terminal,
)
from vispress.cli_search import search
from vispress.distillation.command import train_compressor
from vispress.errors import VispressError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        from vispress import __version__

        typer.echo(f"vispress {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Tell the version."),
    ] = False,
) -> None:
    """Visual-token compression for multimodal LLMs on Hugging Face transformers."""


def main() -> None:
    """Run the command line; an expected error is one line on stderr and exit code 2."""
    try:
        app()
    except VispressError as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", markup=False)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(141)


def doctor(as_json: Json = False) -> None:
    """Check versions, devices, models and what is shipped.

    Exit code 1 if something is broken.
    """
    from vispress.doctor import diagnose

    broken = False
    table = Table("check", "status", "detail")
    styles = {"ok": "green", "missing": "yellow", "broken": "red"}
    console = terminal()
    try:
        quiet()
    except ImportError:
        console.print("transformers is missing", style="red")
    checks = []
    with console.status("looking"):
        for check in diagnose():
            broken |= check.status == "broken"
            checks.append(asdict(check))
            table.add_row(
                check.name, f"[{styles[check.status]}]{check.status}[/]", escape(check.detail)
            )
    if as_json:
        typer.echo(json.dumps(checks, indent=2))
    else:
        console.print(table)
    if broken:
        raise typer.Exit(1)


def train_reference(
    out: Annotated[Path, typer.Option(help="A stopped run goes on from here.")] = Path("reference"),
    architecture: Annotated[str, typer.Option(help="'llava' or 'qwen2_5_vl'.")] = "llava",
    seed: Annotated[int, typer.Option(help="Of weights, scenes and questions.")] = 0,
    vision_minutes: Annotated[float | None, typer.Option(help="Limit of stage 1.")] = None,
    vision_images: Annotated[int | None, typer.Option(help="Limit of stage 1.")] = None,
    language_minutes: Annotated[float | None, typer.Option(help="Limit of stage 2.")] = None,
    language_images: Annotated[int | None, typer.Option(help="Limit of stage 2.")] = None,
    episodes_minutes: Annotated[float | None, typer.Option(help="Limit of stage 3.")] = None,
    episodes_images: Annotated[int | None, typer.Option(help="Limit of stage 3.")] = None,
    start: Annotated[Path | None, typer.Option(help="Checkpoint folder for stage 3 alone.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that draw scenes.")] = 1,
    resume: Annotated[bool, typer.Option(help="Go on from saved state.")] = True,
    device: Device = "cpu",
) -> None:
    """Train the reference model from nothing."""
    prepare()
    from vispress.reference.model.architecture import ARCHITECTURES
    from vispress.reference.train.train import train_reference as train

    check_choice("architecture", architecture, ARCHITECTURES)
    scores = train(
        out,
        architecture=architecture,
        seed=seed,
        vision_minutes=vision_minutes,
        vision_images=vision_images,
        language_minutes=language_minutes,
        language_images=language_images,
        episodes_minutes=episodes_minutes,
        episodes_images=episodes_images,
        start=start,
        resume=resume,
        device=device,
        workers=workers,
    )
    table = Table("task", "accuracy %")
    for task, score in scores.items():
        table.add_row(task, f"{100 * score:.1f}")
    terminal().print(table)


_COMMANDS = (
    methods, show, bench, report, reproduce, join, search, train_compressor, fit_debias, demo,
    doctor, train_reference,
)  # fmt: skip
for _command in _COMMANDS:
    app.command(name=_command.__name__.replace("_", "-"))(_command)
app.add_typer(probe, name="probe")

if __name__ == "__main__":
    main()
