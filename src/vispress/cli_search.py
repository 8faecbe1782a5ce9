"""`vispress search`: find a schedule for a model, as a YAML file that `compress_model` takes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from vispress.checks import check_choice
from vispress.cli_options import Device, check_early, prepare, terminal
from vispress.errors import ConfigError

if TYPE_CHECKING:
    from vispress.bench.search.objective import ScheduleObjective, SearchResult

STRATEGIES = ("greedy", "sigmoid", "withdrawal")
_OWN_TASKS = ("attribute", "place", "existence", "needle", "digit", "reading", "where", "relation")

Strategy = Annotated[
    str,
    typer.Argument(
        help="'greedy': the least rate of each layer within --tolerance. 'sigmoid': the best "
        "sigmoid under --keep-ratio or --flops, by Bayesian optimisation. 'withdrawal': the first "
        "layer before which all visual tokens may leave (VTW), within --tolerance."
    ),
]
Name = Annotated[
    str, typer.Option(help="'reference', 'reference-qwen', a checkpoint's folder, or a hub id.")
]
Tasks = Annotated[
    list[str] | None, typer.Option(help="Repeat; the reference model has tasks of its own.")
]
Measure = Annotated[
    str | None,
    typer.Option(
        help="'kl' (of the first token), 'reverse_kl' (withdrawal's), 'loyalty' or 'accuracy'."
    ),
]
Method = Annotated[
    str, typer.Option(help="Greedy: a method with layers and ratios, whose ranking is used.")
]
Options = Annotated[
    list[str] | None, typer.Option("--set", help="KEY=VALUE, a hyper-parameter (YAML).")
]
Tolerance = Annotated[
    float | None,
    typer.Option(
        help="Nats of KL, or share of accuracy or loyalty, to lose: greedy 0.005, withdrawal 0.003."
    ),
]
Ratio = Annotated[
    float | None, typer.Option(help="Sigmoid: mean of visual tokens over layers, in (0, 1].")
]
Flops = Annotated[
    float | None, typer.Option(help="Sigmoid: share of the visual tokens' FLOPs, in (0, 1].")
]


def search(
    strategy: Strategy = "greedy",
    out: Annotated[Path, typer.Option(help="Folder; a stopped search goes on.")] = Path("search"),
    model: Name = "reference",
    task: Tasks = None,
    questions: Annotated[int, typer.Option(help="Of each task, to calibrate on.")] = 25,
    metric: Measure = None,
    method: Method = "layerwise",
    option: Options = None,
    tolerance: Tolerance = None,
    keep_ratio: Ratio = None,
    flops: Flops = None,
    trials: Annotated[int, typer.Option(help="Sigmoid: how many are tried.")] = 40,
    batch_size: Annotated[int, typer.Option(help="Prompts a batch.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 4,
    seed: Annotated[int, typer.Option(help="Of questions and trials.")] = 0,
    device: Device = "cpu",
) -> None:
    """Search how many tokens each layer needs.

    Writes schedule.yaml, which `compress_model(config=...)` takes.
    """
    from vispress.bench.model.names import REFERENCES

    unit, share = _budget(strategy, keep_ratio, flops)
    withdraws = strategy == "withdrawal"
    if withdraws and (method != "layerwise" or option):
        raise ConfigError("withdrawal searches the layer of vtw; leave --method and --set out")
    if not task and model not in REFERENCES:
        raise ConfigError(f"--task is needed for the model {model!r}; GQA, say, is --task gqa")
    check_early(methods=[method], model=model, keep_ratio=keep_ratio)
    prepare()
    from vispress.bench.search.greedy import SearchRequest
    from vispress.bench.search.objective import Calibration
    from vispress.bench.search.withdrawal import TOLERANCE
    from vispress.method_options import parse_options

    values = parse_options(option or [])
    calibration = Calibration(
        tasks=tuple(task or _OWN_TASKS),
        metric=metric or ("reverse_kl" if withdraws else "kl"),  # type: ignore[arg-type]
        questions=questions,
        seed=seed,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
    # what is wrong with the options shows before the model is loaded
    if withdraws:
        tolerance = TOLERANCE if tolerance is None else tolerance
        request = SearchRequest(withdraws=True, tolerance=tolerance)
    else:
        tolerance = 0.005 if tolerance is None else tolerance
        request = SearchRequest.of(
            method, values, unit, share, tolerance=tolerance, trials=trials, seed=seed
        )
    _search(request, calibration, out, model, device)


def _budget(strategy: str, keep_ratio: float | None, flops: float | None) -> tuple[Any, float]:
    """Unit and share of a sigmoid's budget; no unit for the greedy search."""
    given = {"tokens": keep_ratio, "flops": flops}
    found = [(unit, share) for unit, share in given.items() if share is not None]
    check_choice("strategy", strategy, STRATEGIES)
    if strategy != "sigmoid" and found:
        raise ConfigError(f"a {strategy} search takes no budget, its --tolerance says when to stop")
    if strategy == "sigmoid" and len(found) != 1:
        raise ConfigError("a sigmoid needs one budget: give --keep-ratio or --flops")
    return found[0] if found else (None, 1.0)


def _search(request: Any, calibration: Any, out: Path, model: str, device: str) -> None:
    from vispress.bench.model.loaded_model import load_named_model
    from vispress.bench.run.progress import counting
    from vispress.bench.search.objective import ScheduleObjective

    loaded = load_named_model(model, device)
    console = terminal()
    path = out / "schedule.yaml"
    try:
        out.mkdir(parents=True, exist_ok=True)
        objective = ScheduleObjective(loaded, calibration, out / "values.jsonl")
        # the uncompressed model, what is tried, and what is found
        runs = 2 + request.most(objective.num_layers)
        with counting(runs * objective.num_questions, console) as objective.advance:
            found = request.search(objective, out / "trials.journal")
        found.save(path, objective, request.words)
    except KeyboardInterrupt:
        console.print(f"\nstopped; the same command goes on from what is in {out}")
        raise typer.Exit(130) from None
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror or error}") from error
    console.print(_table(found, objective))
    console.print(f'written: {path}; use: compress_model(model, config="{path}")', soft_wrap=True)


def _table(found: "SearchResult", objective: "ScheduleObjective") -> Table:
    """Placements of the schedule, and what it is worth."""
    metric = objective.calibration.metric
    title = (
        f"{found.method.name}: {metric} {found.value:.4f} (uncompressed {found.uncompressed:.4f})"
    )
    caption = (
        f"{100 * found.tokens:.1f} % of visual tokens as a mean over layers, "
        f"{100 * found.flops:.1f} % of their FLOPs"
    )
    table = Table("before layer", "tokens kept", title=title, caption=caption)
    for placement in found.method.placements(objective.num_layers):
        count = placement.budget.resolve(objective.num_visual)
        table.add_row(str(placement.layer), f"{count} of {objective.num_visual}")
    return table
