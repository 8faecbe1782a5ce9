"""`vispress bench` and what belongs to it: `reproduce`, `join`, `report`, `demo`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from vispress.checks import check_integer
from vispress.cli_options import (
    Device,
    Force,
    Imports,
    Model,
    check_early,
    prepare,
    terminal,
)
from vispress.user_code import import_files
from vispress.yaml_files import shipped_files

if TYPE_CHECKING:
    from vispress.bench.plan.plan import Plan

PLANS = ", ".join(sorted(shipped_files("bench")))


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


def reproduce(
    method: Annotated[str, typer.Argument(help="Its paper's setting is run.")],
    out: Annotated[Path, typer.Option(help="Results folder; a stopped run goes on.")] = Path(
        "results"
    ),
    plan: Annotated[
        str, typer.Option(help=f"Whose model and tasks: a YAML file, or one of {PLANS}.")
    ] = "llava15",
    model: Model = None,
    task: Annotated[list[str] | None, typer.Option(help="In place of the plan's; repeat.")] = None,
    questions: Annotated[int | None, typer.Option(help="Questions a task.")] = None,
    device: Device = "cpu",
    force: Force = False,
) -> None:
    """Run a method's own paper setting, beside what is printed.

    The plan's model, tasks and questions; the method as its authors run it, and at every budget
    that papers print of that model.
    """
    from vispress.bench.plan.files import plan_path

    plan_path(plan)
    check_early(methods=[method], model=model)
    prepare()
    from vispress.bench.plan.reproduce import reproduction

    made = reproduction(method, plan, tasks=task or (), model=model, questions=questions)
    _bench(made, out, device, force)


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
