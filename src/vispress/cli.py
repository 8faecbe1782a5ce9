"""The command line. Commands are thin, and import what they need when they run."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vispress.analysis.arank import probe
from vispress.analysis.fit_debias import fit_debias
from vispress.analysis.show import show
from vispress.checks import check_choice, check_integer
from vispress.cli_methods import methods
from vispress.cli_options import (
    Device,
    Force,
    Imports,
    Json,
    Model,
    check_early,
    prepare,
    quiet,
    terminal,
)
from vispress.cli_search import search
from vispress.distillation.command import train_compressor
from vispress.errors import VispressError
from vispress.user_code import import_files
from vispress.yaml_files import shipped_files

if TYPE_CHECKING:
    from vispress.bench.plan.plan import Plan

PLANS = ", ".join(sorted(shipped_files("bench")))

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


def bench(
    plan: Annotated[str, typer.Argument(help=f"A YAML file, or one of {PLANS}.")] = "smoke",
    out: Annotated[Path, typer.Option(help="Results folder; a stopped run goes on.")] = Path(
        "results"
    ),
    model: Model = None,
    questions: Annotated[int | None, typer.Option(help="Questions a task.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Prompts a batch.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of questions and bootstrap.")] = None,
    device: Device = "cpu",
    imports: Imports = None,
    share: Annotated[
        bool,
        typer.Option(
            "--share",
            help="Other processes with this command, started at any time (a job array), take part.",
        ),
    ] = False,
    force: Force = False,
) -> None:
    """Measure accuracy, tokens, time and cache of methods.

    A plan names tasks, methods and keep ratios; its results are a folder that `report` reads.
    """
    from vispress.bench.plan.files import plan_path

    plan_path(plan)
    check_early(model=model)
    for name, value, low in (("questions", questions, 1), ("batch_size", batch_size, 1)):
        if value is not None:
            check_integer(name, value, low=low)
    prepare()
    from vispress.bench.plan.plan import load_plan

    overrides: dict[str, Any] = {"model": model, "questions": questions, "seed": seed}
    made = load_plan(plan, imports=imports or (), batch_size=batch_size, **overrides)
    _bench(made, out, device, force, share=share)


def _bench(plan: "Plan", out: Path, device: str, force: bool, *, share: bool = False) -> None:
    from vispress.bench.results.shards import this_shard
    from vispress.bench.run.engine import run
    from vispress.bench.run.progress import progress_bar

    shard = this_shard()
    console = terminal() if shard.leader else Console(quiet=True)
    try:
        with progress_bar(plan, console, processes=shard.world) as advance:
            run(plan, out, device=device, force=force, advance=advance, shard=shard, share=share)
    except KeyboardInterrupt:
        console.print(f"\nstopped; the same command goes on from what is in {out}")
        raise typer.Exit(130) from None
    if shard.leader:
        _summary(out, console)


def _summary(out: Path, console: Console) -> None:
    """Show the tables of a results folder, and write them and the plots beside the cells."""
    from vispress.bench.results.plots import write_plots
    from vispress.bench.results.summary import summarise, write_summary
    from vispress.bench.results.table import tables

    summary = summarise(out)
    console.print(tables(summary))
    write_summary(summary, out)
    files = [out / "summary.json", out / "summary.csv", *write_plots(summary, out)]
    console.print("written: " + ", ".join(map(str, files)), soft_wrap=True)


def join(
    results: Annotated[list[Path], typer.Argument(help="Two or more folders of vispress bench.")],
    out: Annotated[Path, typer.Option(help="A folder for the joined results.")],
    force: Force = False,
) -> None:
    """Join runs of the same questions in one folder."""
    from vispress.bench.results.merge_runs import merge_runs

    prepare()
    console = terminal()
    shared = merge_runs(results, out, force=force)
    console.print(f"{shared} cells were measured more than once, and agree")
    _summary(out, console)


def report(
    results: Annotated[Path, typer.Argument(help="Folder of vispress bench.")] = Path("results"),
    out: Annotated[
        Path | None, typer.Option(help="The page; report.html in the folder by default.")
    ] = None,
    pictures: Annotated[
        bool, typer.Option(help="Sample questions, kept tokens and failures; runs the model.")
    ] = True,
    samples: Annotated[int, typer.Option(min=0, help="Sample questions a task.")] = 2,
    device: Device = "cpu",
    imports: Imports = None,
) -> None:
    """Make one HTML page of a results folder.

    Frontiers, tests, costs, kept tokens, failures.
    """
    prepare()
    import_files(imports or ())
    from vispress.bench.page.render import write_page

    console = terminal()
    with console.status("reading") as status:
        options: dict[str, Any] = {"pictures": pictures, "samples": samples, "device": device}
        page = write_page(results, out, **options, advance=lambda what, _: status.update(what))
    console.print(f"written: {page}", soft_wrap=True)


def demo(
    out: Annotated[Path, typer.Option(help="Where results and picture go.")] = Path("demo"),
    model: Model = None,
    device: Device = "cpu",
) -> None:
    """Run a small benchmark and draw kept tokens.

    On the reference model; takes some minutes.
    """
    check_early(model=model)
    prepare()
    from vispress.analysis.show import draw
    from vispress.bench.plan.plan import load_plan
    from vispress.method_options import make_all

    # a demo of another commit is moved aside, not refused
    _bench(load_plan("demo", model=model), out, device, force=True)
    names = ["fastv", "fastervlm", "divprune", "visionzip", "fourier", "random", "uniform"]
    chosen = make_all(names, {"mean_keep_ratio": 0.25, "dims": 2})
    draw("scene:3", "needle", chosen, out / "kept.png", model or "reference", device)


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
    methods, show, bench, report, join, search, train_compressor, fit_debias, demo, doctor,
    train_reference,
)  # fmt: skip
for _command in _COMMANDS:
    app.command(name=_command.__name__.replace("_", "-"))(_command)
app.add_typer(probe, name="probe")

if __name__ == "__main__":
    main()
