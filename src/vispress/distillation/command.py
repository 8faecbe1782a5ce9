"""`vispress train-compressor`: a method's parameters for a user's model and pictures."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vispress.checks import check_choice, check_number
from vispress.cli_options import (
    Asked,
    BatchSize,
    Data,
    Device,
    Loaded,
    Precision,
    Settings,
    check_early,
    prepare,
    terminal,
)
from vispress.errors import ConfigError

if TYPE_CHECKING:
    from vispress.bench.model.loaded_model import Dtype, LoadedModel
    from vispress.bench.tasks.task import Prompt

DEFAULT_RATIO = 0.111


def train_compressor(
    method: Annotated[str, typer.Option(help="What is trained.")] = "relevance_dpp",
    stage: Annotated[
        str | None,
        typer.Option(help="How: attention, answers...; a method's first way by default."),
    ] = None,
    start_from: Annotated[
        Path | None, typer.Option(help="A folder with the parameters to begin with.")
    ] = None,
    data: Data = None,
    question: Asked = None,
    samples: Annotated[int | None, typer.Option(min=20, help="Prompts, at most.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of the optimiser.")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    keep_ratio: Annotated[
        float | None,
        typer.Option(help="Written to the configuration; 0.111 for methods without a schedule."),
    ] = None,
    option: Settings = None,
    out: Annotated[Path, typer.Option(help="A folder for the compressor.")] = Path("compressor"),
    model: Loaded = "reference",
    batch_size: BatchSize = 8,
    seed: Annotated[int, typer.Option(help="Of what is drawn, and of the order.")] = 0,
    device: Device = "cpu",
    dtype: Precision = "fp32",
) -> None:
    """Train a method's parameters for a model.

    By the model's own attention or by answers; method and parameters are saved in a folder, which
    `compress_model(model, config=FOLDER)` takes. The model's weights stay as they are. Stopped, the
    same command goes on from its last 50 steps.
    """
    check_early(methods=[method], model=model, keep_ratio=keep_ratio)
    prepare()
    from vispress import save_compression
    from vispress.bench.model.loaded_model import DTYPES, load_named_model
    from vispress.distillation.lessons import Pupil, find_lesson
    from vispress.distillation.unfinished import Unfinished
    from vispress.method_options import make_budgeted, parse_options
    from vispress.weights import check_writable

    lesson = find_lesson(method, stage)
    check_choice("dtype", dtype, DTYPES)
    given = {} if keep_ratio is None else {"keep_ratio": keep_ratio}
    made = make_budgeted(method, given | parse_options(option or []), DEFAULT_RATIO)
    samples, steps = samples or lesson.samples, steps or lesson.steps
    lr = lesson.lr if lr is None else lr
    check_number("lr", lr, low=1e-12, high=1e6)
    check_writable(out)
    loaded = load_named_model(model, device, cast("Dtype", dtype))
    console = terminal()
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:

        def begin(what: str, total: int) -> Callable[[int], None]:
            shown = bar.add_task(what, total=total)
            return lambda by: bar.advance(shown, by)

        drawn = draw(data, question or [], samples, seed, loaded, several=lesson.several)
        sizes: dict[str, Any] = {"samples": samples, "steps": steps, "lr": lr, "seed": seed}
        told = sizes | {"data": data or "reference scenes", "stage": lesson.stage}
        told |= {"model": loaded.name, "weights": loaded.weights}
        whole = told | {"method": method, "options": made.hyperparameters(), "dtype": dtype}
        whole |= {"question": question, "batch_size": batch_size, "start_from": start_from}
        pupil = Pupil(
            loaded, made, drawn, batch_size=batch_size, start_from=start_from, begin=begin, **sizes,
            unfinished=Unfinished(out / "unfinished.safetensors", whole),
        )  # fmt: skip
        curve = lesson.teach(pupil)
    told["held_out"] = [round(value, 4) for value in curve.held_out]
    save_compression(loaded.model, out, data=told)
    losses = {"loss": [round(loss, 5) for loss in curve.loss], "held_out": curve.held_out}
    (out / "curve.json").write_text(json.dumps(losses) + "\n", encoding="utf-8")
    pupil.unfinished.clear()
    before, after = curve.held_out
    console.print(
        f"{lesson.measure}, on what was held out: {before:.3f} before, {after:.3f} behind\n"
        f"written: {out}",
        soft_wrap=True,
    )


def draw(
    data: str | None,
    questions: list[str],
    samples: int,
    seed: int,
    loaded: "LoadedModel",
    *,
    several: bool = False,
) -> Iterator["Prompt"]:
    """Draw prompts to learn from, as the command describes them.

    Args:
        data: Pictures; the reference model's scenes if left out.
        questions: About each of them.
        samples: Prompts, at most.
        seed: Of what is drawn.
        loaded: The model.
        several: Some scenes are shown together, to a reference that knows such prompts.

    Raises:
        ConfigError: The data cannot be read, or the default is asked for of another model.
    """
    from vispress.analysis.fit_debias import draw_prompts
    from vispress.bench.model.checkpoints import Checkpoint
    from vispress.distillation.scenes import training_prompts

    if data is not None or questions:
        return draw_prompts(data, questions, samples, seed, loaded)
    if isinstance(loaded, Checkpoint):
        raise ConfigError(
            f"give --data for {loaded.name}: scenes of the reference model are no pictures that "
            "it was made for"
        )
    # the Qwen2.5-VL was trained on single pictures, the LLaVA on several, too
    knows = loaded.model.config.model_type == "llava"
    return training_prompts(samples, seed, episodes=several and knows)
