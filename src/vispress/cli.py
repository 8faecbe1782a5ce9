"""The command line. Commands are thin, and import what they need when they run."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vispress.analysis.arank import probe
from vispress.analysis.fit_debias import fit_debias
from vispress.checks import check_choice, suggest
from vispress.cli_options import Device, Force, Model, prepare, quiet, terminal
from vispress.cli_search import search
from vispress.distillation.command import train_compressor
from vispress.errors import ConfigError, VispressError

if TYPE_CHECKING:
    from vispress.bench.plan.plan import Plan
    from vispress.methods.base import Compressor

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
) -> None:
    """List the methods, what they read and which model families they work on."""
    from vispress.doctor import families
    from vispress.listing import method_table

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
            table.add_row(check.name, f"[{styles[check.status]}]{check.status}[/]", check.detail)
    console.print(table)
    if broken:
        raise typer.Exit(1)


@app.command()
def bench(
    plan: Annotated[str, typer.Argument(help="A YAML file, or smoke, demo, offline.")] = "offline",
    out: Annotated[Path, typer.Option(help="Results folder; a stopped run goes on.")] = Path(
        "results"
    ),
    model: Model = None,
    questions: Annotated[int | None, typer.Option(help="Questions a task.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Prompts a batch.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of questions and bootstrap.")] = None,
    device: Device = "cpu",
    force: Force = False,
) -> None:
    """Measure accuracy, kept tokens, prefill time and cache size of methods at keep ratios."""
    from vispress.bench.plan.plan import load_plan

    overrides: dict[str, Any] = {"model": model, "questions": questions, "seed": seed}
    _bench(load_plan(plan, batch_size=batch_size, **overrides), out, device, force)


def _bench(plan: "Plan", out: Path, device: str, force: bool) -> None:
    from vispress.bench.results.shards import this_shard
    from vispress.bench.run.engine import run
    from vispress.bench.run.progress import progress_bar

    prepare()
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
) -> None:
    """Make one HTML page of results: frontiers, tests, costs, kept tokens, failures."""
    prepare()
    from vispress.bench.page.render import write_page

    console = terminal()
    with console.status("reading") as status:
        options: dict[str, Any] = {"pictures": pictures, "samples": samples, "device": device}
        page = write_page(results, out, **options, advance=lambda what, _: status.update(what))
    console.print(f"written: {page}", soft_wrap=True)


@app.command()
def show(
    image: Annotated[str, typer.Argument(help="An image file, or scene:SEED for a drawn one.")],
    method: Annotated[list[str], typer.Option(help="Repeat to compare several.")],
    question: Annotated[
        str | None, typer.Option(help="Words, or for scene:SEED the name of a task.")
    ] = None,
    keep_ratio: Annotated[float | None, typer.Option(help="In (0, 1].")] = None,
    num_tokens: Annotated[int | None, typer.Option(help="In place of --keep-ratio.")] = None,
    layer: Annotated[int | None, typer.Option(help="For methods with one layer.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE, a hyper-parameter (YAML).")
    ] = None,
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("kept.png"),
    model: Model = None,
    device: Device = "cpu",
) -> None:
    """Draw which tokens methods keep of a picture, with the model's answers."""
    from vispress.listing import make_all, parse_options

    given = {"keep_ratio": keep_ratio, "num_tokens": num_tokens, "layer": layer}
    values = {k: v for k, v in given.items() if v is not None} | parse_options(option or [])
    _show(image, question, make_all(method, values), out, model or "reference", device)


def _show(
    image: str, question: str | None, chosen: "list[Compressor]", out: Path, model: str, device: str
) -> None:
    prepare()
    from vispress.analysis.inspect import inspect, open_prompt, unknown_words
    from vispress.analysis.overlay import draw_views, seen_picture
    from vispress.bench.model.loaded_model import load_named_model

    prompt = open_prompt(image, question)
    loaded = load_named_model(model, device)
    console = terminal()
    if words := unknown_words(loaded, prompt):
        console.print(f"the model does not know: {', '.join(words)}", style="yellow")
    views = inspect(loaded, prompt, chosen, None)
    asked = prompt.text.removeprefix("<image>").removesuffix(":").strip()
    table = Table("method", "answer", "kept at the end", "mean over layers", title=asked)
    for view in views:
        end = "" if view.image is None else f"{view.image.num_kept} of {view.image.num_visual}"
        table.add_row(view.title, view.answer, end, f"{100 * view.mean_keep_ratio:.1f} %")
    console.print(table)
    if prompt.answer:
        console.print(f"right answer: {prompt.answer}")
    picture = seen_picture(loaded, prompt)
    evidence = prompt.evidence[0] if prompt.evidence else ()
    draw_views(picture, views, asked, out, evidence=evidence, truth=prompt.answer)
    console.print(f"written: {out}", soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where results and picture go.")] = Path("demo"),
    model: Model = None,
    device: Device = "cpu",
) -> None:
    """A small benchmark of the reference model, and a picture of kept tokens; some minutes."""
    from vispress.bench.plan.plan import load_plan
    from vispress.listing import make_all

    # a demo of another commit is moved aside, not refused
    _bench(load_plan("demo", model=model), out, device, force=True)
    names = ["fastv", "fastervlm", "divprune", "visionzip", "fourier", "random", "uniform"]
    chosen = make_all(names, {"mean_keep_ratio": 0.25, "dims": 2})
    _show("scene:3", "needle", chosen, out / "kept.png", model or "reference", device)


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
