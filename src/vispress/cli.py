"""The command line. Commands are thin, and import what they need when they run."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vispress.analysis.arank import probe
from vispress.analysis.fit_debias import fit_debias
from vispress.analysis.show import show
from vispress.checks import check_choice, check_integer, suggest
from vispress.cli_options import (
    Device,
    Force,
    Imports,
    Model,
    check_early,
    prepare,
    quiet,
    terminal,
)
from vispress.cli_search import search
from vispress.distillation.command import train_compressor
from vispress.errors import ConfigError, VispressError
from vispress.user_code import import_files
from vispress.yaml_files import shipped_files

if TYPE_CHECKING:
    from vispress.bench.plan.plan import Plan

PLANS = ", ".join(sorted(shipped_files("bench")))

app = typer.Typer(
    help="Visual-token compression for multimodal LLMs on Hugging Face transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
app.command(name="fit-debias")(fit_debias)
app.command(name="train-compressor")(train_compressor)
app.command()(search)
app.command()(show)
app.add_typer(probe, name="probe")


def main() -> None:
    """Run the command line; an expected error is one line on stderr and exit code 2."""
    try:
        app()
    except VispressError as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", markup=False)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(141)


@app.command()
def methods(
    model: Annotated[
        str | None, typer.Option(help="Only methods that work on this model family.")
    ] = None,
    imports: Imports = None,
) -> None:
    """List the methods, what they read and which model families they work on."""
    from vispress.doctor import families
    from vispress.listing import method_table

    import_files(imports or ())
    known = families()
    if model is not None:
        known = [family for family in known if family.name == model]
        if not known:
            names = [family.name for family in families()]
            raise ConfigError(f"unknown model family {model!r}; {suggest(model, names)}")
    terminal().print(method_table(known))


@app.command()
def doctor() -> None:
    """Check versions, device, models and the reference checkpoint; exit code 1 if one fails."""
    from vispress.doctor import diagnose

    broken = False
    table = Table("check", "status", "detail")
    styles = {"ok": "green", "missing": "yellow", "broken": "red"}
    console = terminal()
    try:
        quiet()
    except ImportError:
        console.print("transformers is missing", style="red")
    with console.status("looking"):
        for check in diagnose():
            broken |= check.status == "broken"
            table.add_row(
                check.name, f"[{styles[check.status]}]{check.status}[/]", escape(check.detail)
            )
    console.print(table)
    if broken:
        raise typer.Exit(1)


@app.command()
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
    force: Force = False,
) -> None:
    """Measure accuracy, kept tokens, prefill time and cache size of methods at keep ratios."""
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
    _bench(made, out, device, force)


def _bench(plan: "Plan", out: Path, device: str, force: bool) -> None:
    from vispress.bench.results.shards import this_shard
    from vispress.bench.run.engine import run
    from vispress.bench.run.progress import progress_bar

    shard = this_shard()
    console = terminal() if shard.leader else Console(quiet=True)
    try:
        with progress_bar(plan, console, processes=shard.world) as advance:
            run(plan, out, device=device, force=force, advance=advance, shard=shard)
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


@app.command()
def join(
    results: Annotated[list[Path], typer.Argument(help="Two or more folders of vispress bench.")],
    out: Annotated[Path, typer.Option(help="A folder for the joined results.")],
    force: Force = False,
) -> None:
    """Put runs of the same questions in one folder, to report on all their methods together."""
    from vispress.bench.results.merge_runs import merge_runs

    prepare()
    console = terminal()
    shared = merge_runs(results, out, force=force)
    console.print(f"{shared} cells were measured more than once, and agree")
    _summary(out, console)


@app.command()
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
    """Make one HTML page of results: frontiers, tests, costs, kept tokens, failures."""
    prepare()
    import_files(imports or ())
    from vispress.bench.page.render import write_page

    console = terminal()
    with console.status("reading") as status:
        options: dict[str, Any] = {"pictures": pictures, "samples": samples, "device": device}
        page = write_page(results, out, **options, advance=lambda what, _: status.update(what))
    console.print(f"written: {page}", soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where results and picture go.")] = Path("demo"),
    model: Model = None,
    device: Device = "cpu",
) -> None:
    """Run a small benchmark of the reference model and draw kept tokens; takes some minutes."""
    check_early(model=model)
    prepare()
    from vispress.analysis.show import draw
    from vispress.bench.plan.plan import load_plan
    from vispress.listing import make_all

    # a demo of another commit is moved aside, not refused
    _bench(load_plan("demo", model=model), out, device, force=True)
    names = ["fastv", "fastervlm", "divprune", "visionzip", "fourier", "random", "uniform"]
    chosen = make_all(names, {"mean_keep_ratio": 0.25, "dims": 2})
    draw("scene:3", "needle", chosen, out / "kept.png", model or "reference", device)


@app.command(name="train-reference")
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


if __name__ == "__main__":
    main()
