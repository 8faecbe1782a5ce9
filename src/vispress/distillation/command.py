"""`vispress train-compressor`: a method's parameters for a user's model and pictures."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vispress.checks import check_choice
from vispress.cli_options import (
    Asked,
    BatchSize,
    Data,
    Device,
    Loaded,
    Precision,
    Settings,
    prepare,
    terminal,
)
from vispress.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from vispress.bench.model.loaded_model import Dtype, LoadedModel
    from vispress.bench.tasks.task import Prompt
    from vispress.distillation.distil import Curve
    from vispress.methods.base import Compressor

BY_ATTENTION = ("relevance_dpp",)
"""Methods whose parameters this command trains, by what the model itself attends to."""
DEFAULT_RATIO = 0.111


def train_compressor(
    method: Annotated[str, typer.Option(help="What is trained.")] = "relevance_dpp",
    data: Data = None,
    question: Asked = None,
    samples: Annotated[int, typer.Option(min=20, help="Prompts, at most.")] = 4000,
    steps: Annotated[int, typer.Option(min=1, help="Of the optimiser.")] = 400,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 2e-3,
    keep_ratio: Annotated[
        float, typer.Option(help="Written to the configuration.")
    ] = DEFAULT_RATIO,
    option: Settings = None,
    out: Annotated[Path, typer.Option(help="A folder for the compressor.")] = Path("compressor"),
    model: Loaded = "reference",
    batch_size: BatchSize = 8,
    seed: Annotated[int, typer.Option(help="Of what is drawn, and of the order.")] = 0,
    device: Device = "cpu",
    dtype: Precision = "fp32",
) -> None:
    """Train a method's parameters for a model, without labels, and save both as a folder.

    `compress_model(model, config=FOLDER)` has it. The model's weights stay as they are.
    """
    prepare()
    from vispress import save_compression
    from vispress.bench.model.loaded_model import DTYPES, load_named_model
    from vispress.listing import make_all, parse_options

    check_choice("method", method, BY_ATTENTION)
    check_choice("dtype", dtype, DTYPES)
    values = {"keep_ratio": keep_ratio} | parse_options(option or [])
    (made,) = make_all([method], values)
    loaded = load_named_model(model, device, cast("Dtype", dtype))
    prompts = draw(data, question or [], samples, seed, loaded)
    console = terminal()
    told: dict[str, Any] = {"samples": samples, "steps": steps, "lr": lr, "seed": seed}
    curve = train(loaded, prompts, made, console, batch_size=batch_size, **told)
    told |= {"data": data or "reference scenes", "model": loaded.name, "weights": loaded.weights}
    told["held_out"] = [round(value, 4) for value in curve.held_out]
    save_compression(loaded.model, out, data=told)
    losses = {"loss": [round(loss, 5) for loss in curve.loss], "held_out": curve.held_out}
    (out / "curve.json").write_text(json.dumps(losses) + "\n", encoding="utf-8")
    before, after = curve.held_out
    console.print(
        f"divergence from the model's attention on what was held out: {before:.3f} before, "
        f"{after:.3f} behind\nwritten: {out}",
        soft_wrap=True,
    )


def draw(
    data: str | None, questions: list[str], samples: int, seed: int, loaded: "LoadedModel"
) -> Iterator["Prompt"]:
    """Draw prompts to learn from, as the command describes them.

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
    return training_prompts(samples, seed)


def train(
    loaded: "LoadedModel",
    prompts: Iterator["Prompt"],
    method: "Compressor",
    console: "Console",
    *,
    samples: int,
    steps: int,
    lr: float,
    seed: int,
    batch_size: int,
) -> "Curve":
    """Compress the model, and train the method's parameters; they stay with it.

    Raises:
        ConfigError: There are too few images with a question behind them.
    """
    from vispress import compress_model
    from vispress.adapters.base import find_adapter
    from vispress.distillation.distil import distil
    from vispress.distillation.targets import listen
    from vispress.runtime.modules import MODULES

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        shown = bar.add_task("attention", total=samples)
        heard = list(
            listen(loaded, prompts, batch_size=batch_size, advance=lambda n: bar.advance(shown, n))
        )
        compress_model(loaded.model, method)
        module = getattr(find_adapter(loaded.model).base, MODULES).get_submodule("0")
        learned = bar.add_task("training", total=steps)
        return distil(
            module, heard, steps=steps, lr=lr, seed=seed, advance=lambda _: bar.advance(learned)
        )
