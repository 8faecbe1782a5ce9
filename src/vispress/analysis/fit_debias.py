"""`vispress fit-debias`: the trend of a user's model on the user's pictures, as a configuration."""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from vispress.checks import check_choice
from vispress.cli_options import (
    Asked,
    BatchSize,
    Data,
    Device,
    Loaded,
    Precision,
    Settings,
    check_early,
    check_file,
    prepare,
    terminal,
    tracked,
)
from vispress.errors import ConfigError

if TYPE_CHECKING:
    from vispress.analysis.trend import Fit
    from vispress.bench.model.loaded_model import Dtype, LoadedModel
    from vispress.bench.tasks.task import Prompt
    from vispress.methods.base import Compressor
    from vispress.methods.debias import Debias

DEFAULT_RATIO = 0.25
LEAST = 0.05
"""Share of what varies that a trend explains to be worth taking out."""
_PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def fit_debias(
    method: Annotated[str, typer.Option(help="What is corrected: fastv, pyramiddrop...")] = "fastv",
    data: Data = None,
    question: Asked = None,
    samples: Annotated[int, typer.Option(min=1, help="Prompts, at most.")] = 200,
    keep_ratio: Annotated[
        float | None,
        typer.Option(help="Written to the file; 0.25 for methods without a schedule."),
    ] = None,
    num_tokens: Annotated[int | None, typer.Option(help="In place of --keep-ratio.")] = None,
    layer: Annotated[int | None, typer.Option(help="For methods with one layer.")] = None,
    option: Settings = None,
    shape: Annotated[str, typer.Option(help="exponential or cubic.")] = "exponential",
    out: Annotated[Path, typer.Option(help="The configuration.")] = Path("debias.yaml"),
    model: Loaded = "reference",
    batch_size: BatchSize = 8,
    seed: Annotated[int, typer.Option(help="Which pictures or questions are drawn.")] = 0,
    device: Device = "cpu",
    dtype: Precision = "fp32",
) -> None:
    """Measure how attention grows along the picture.

    Writes a configuration that takes the trend out again.
    """
    check_early(methods=[method], model=model, keep_ratio=keep_ratio)
    prepare()
    from vispress.analysis.trend import fit_trend, measure
    from vispress.bench.model.loaded_model import DTYPES, load_named_model
    from vispress.method_options import make_budgeted, parse_options

    check_choice("dtype", dtype, DTYPES)
    check_choice("shape", shape, ("exponential", "cubic"))
    kind: Literal["exponential", "cubic"] = "cubic" if shape == "cubic" else "exponential"
    asked = {"keep_ratio": keep_ratio, "num_tokens": num_tokens, "layer": layer}
    values = {k: v for k, v in asked.items() if v is not None} | parse_options(option or [])
    inner = make_budgeted(method, values, DEFAULT_RATIO)
    check_file(out)
    loaded = load_named_model(model, device, cast("Dtype", dtype))
    console = terminal()
    prompts = draw_prompts(data, question or [], samples, seed, loaded)
    seen = tracked(prompts, samples, "looking at pictures", console)
    fit = fit_trend(measure(loaded, seen, inner, batch_size), kind)
    found = corrected(inner, fit)
    write(found, fit, loaded, data or "reference scenes", out)
    trend = f"slope {found.slope}" if found.curve is None else f"curve {found.curve}"
    if fit.explained < LEAST:
        console.print(
            f"this trend explains next to nothing (under {100 * LEAST:.0f} %): the attention that "
            f"{method} reads does not follow place on {model}; debiasing will hardly help",
            style="yellow",
        )
    console.print(
        f"{trend}, from {fit.images} pictures; explains {100 * fit.explained:.0f} % of how "
        f"attention varies with place\nwritten: {out}",
        soft_wrap=True,
    )


def corrected(inner: "Compressor", fit: "Fit") -> "Debias":
    """The wrapper that takes a fitted trend out, to six digits."""
    from vispress.methods.debias import Debias

    slope = None if fit.slope is None else float(f"{fit.slope:.6g}")
    curve = None if fit.curve is None else tuple(float(f"{c:.6g}") for c in fit.curve)
    return Debias(inner=inner, slope=slope, curve=curve)


def write(found: "Debias", fit: "Fit", loaded: "LoadedModel", data: str, out: Path) -> None:
    """The configuration, with what it was fitted on.

    Raises:
        ConfigError: The file cannot be written.
    """
    from vispress.config import save_config

    origin = (
        f"Fitted by vispress fit-debias on {fit.images} pictures of {data} with "
        f"{loaded.name}, weights {loaded.weights};\n"
        f"explains {100 * fit.explained:.0f} % of how attention varies with place."
    )
    try:
        save_config(found, out, origin=origin)
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror or error}") from error


def draw_prompts(
    data: str | None, questions: Sequence[str], samples: int, seed: int, loaded: "LoadedModel"
) -> Iterator["Prompt"]:
    """At most `samples` prompts; pictures are opened one by one.

    Args:
        data: See the command.
        questions: For a folder's pictures.
        samples: How many.
        seed: Which ones.
        loaded: Whose manner of asking is followed.

    Raises:
        ConfigError: The data cannot be read, holds no pictures, or a question is missing.
    """
    path = None if data is None else Path(data)
    if path is not None and path.is_dir():
        return _opened(_of_folder(path, questions, samples, seed), loaded)
    if questions:
        raise ConfigError("--question is for a folder of pictures; this data has its own questions")
    if path is not None and path.suffix == ".jsonl":
        return _opened(_of_lines(path, samples, seed), loaded)
    return _of_tasks(data, samples, seed)


def _of_tasks(name: str | None, samples: int, seed: int) -> Iterator["Prompt"]:
    from vispress.bench.tasks.task import get_task
    from vispress.reference.world.words import KINDS

    tasks = [get_task(kind) for kind in (KINDS if name is None else (name,))]
    for number, task in enumerate(tasks):
        share = len(range(number, samples, len(tasks)))
        yield from task.draw(share, seed) if share else ()


def _of_folder(
    folder: Path, questions: Sequence[str], samples: int, seed: int
) -> list[tuple[Path, str, str]]:
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in _PICTURES)
    if not files:
        raise ConfigError(f"{folder} holds no pictures ({', '.join(_PICTURES)})")
    if not questions:
        raise ConfigError("give --question for a folder of pictures; repeat it for several")
    drawn = random.Random(seed).sample(files, min(samples, len(files)))
    return [(file, questions[i % len(questions)], "") for i, file in enumerate(drawn)]


def _of_lines(file: Path, samples: int, seed: int) -> list[tuple[Path, str, str]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file}, line {number} is not JSON: {error}") from error
        if row is None:
            continue
        if not isinstance(row, dict) or not all(
            isinstance(row.get(key), str) for key in ("image", "question")
        ):
            raise ConfigError(f"{file}, line {number} needs 'image' and 'question', both strings")
        answer = row.get("answer", "")
        if not isinstance(answer, str):
            raise ConfigError(f"{file}, line {number} has an 'answer' that is no string")
        rows.append((file.parent / row["image"], row["question"], answer))
    if not rows:
        raise ConfigError(f"{file} has no lines")
    return random.Random(seed).sample(rows, min(samples, len(rows)))


def _opened(rows: Sequence[tuple[Path, str, str]], loaded: "LoadedModel") -> Iterator["Prompt"]:
    from dataclasses import replace

    from vispress.analysis.inspect import open_prompt
    from vispress.bench.model.checkpoints import Checkpoint
    from vispress.bench.tasks.task import MARK

    for file, question, answer in rows:
        prompt = open_prompt(str(file), question)  # asks in the reference model's manner
        prompt = replace(prompt, answer=answer)
        if isinstance(loaded, Checkpoint):
            marked = question if MARK in question else f"{MARK}\n{question}"
            prompt = replace(prompt, text=marked)
        yield prompt
