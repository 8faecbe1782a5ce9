"""Train the reference model's compressors for about a minute each, and ask before and behind.

    python -m benchmarks.lessons [--out FILE] [--save FOLDER] ["METHOD STAGE" ...]

Every lesson of `vispress train-compressor`, with small settings; law 18 holds each to a margin.
Printed are percents of right answers on 90 training-split questions about other scenes than those
that are trained on, and CPU seconds of training. No table is made of these questions. Compressors
are kept as FOLDER/METHOD-STAGE, where a lesson finds one that comes first.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.relevance import SEED, share_right

QUESTIONS = 90


@dataclass(frozen=True)
class Minute:
    """What about a minute of one core is spent on.

    Args:
        options: Of the method.
        samples: Prompts.
        steps: Of the optimiser.
        margin: Percent of right answers that training must bring, at most half of what a run did.
        behind: A lesson of the method that comes first.
        batch: Prompts that go through the model at once.
    """

    options: dict[str, Any]
    samples: int
    steps: int
    margin: float
    behind: str | None = None
    batch: int = 8


EARLY = {"layers": (1,), "num_tokens": 16}
MINUTES = {
    "covipal attention": Minute(EARLY, 300, 80, 15.0),
    "covipal attention-shares": Minute(EARLY, 300, 80, 15.0),
    "covipal answers": Minute(EARLY, 1700, 60, 6.0, behind="covipal attention", batch=24),
    "hicom answers": Minute({"num_tokens": 18}, 640, 80, 20.0),
    "pvc answers": Minute({"after": (3, 4)}, 640, 160, 14.0),
    "relevance_dpp attention": Minute({"num_tokens": 8}, 1000, 150, 6.0),
    "sd_rpn regions": Minute({"layer": 1, "num_tokens": 16}, 160, 60, 12.0),
    "vision_selector answers": Minute({"num_tokens": 16}, 640, 80, 30.0),
    "xai_compress relevance": Minute({"num_tokens": 16}, 400, 150, 5.0),
}


@dataclass(frozen=True)
class Moved:
    """What a lesson brought.

    Args:
        before: Percent of right answers, untrained, or behind the lesson that comes first.
        behind: The same behind this one.
        held_out: What the lesson measures, on what was held out, before and behind.
        seconds: CPU seconds of training.
    """

    before: float
    behind: float
    held_out: tuple[float, float]
    seconds: float


def move(loaded: Any, name: str, save: Path | None = None) -> Moved:
    """Train by one lesson, and ask before and behind; the model is left uncompressed.

    Args:
        loaded: The reference model.
        name: Method and stage.
        save: A folder for what was trained, and for what has been.
    """
    from vispress import compress_model, remove_compression, save_compression
    from vispress.distillation.scenes import training_prompts
    from vispress.registry import get_method

    minute, asked = MINUTES[name], list(training_prompts(QUESTIONS, SEED))
    with tempfile.TemporaryDirectory() as temporary:
        folder = save or Path(temporary)
        start_from = folder / minute.behind.replace(" ", "-") if minute.behind else None
        if minute.behind and start_from:
            if start_from.exists():
                compress_model(loaded.model, config=start_from)
            else:
                teach(loaded, minute.behind, None)
                save_compression(loaded.model, start_from)
        else:
            compress_model(loaded.model, get_method(name.split()[0])(**minute.options))
        before = share_right(loaded, asked)
        remove_compression(loaded.model)
        start = time.process_time()
        held_out = teach(loaded, name, start_from)
        seconds = time.process_time() - start
        save_compression(loaded.model, folder / name.replace(" ", "-"))
    behind = share_right(loaded, asked)
    remove_compression(loaded.model)
    return Moved(before, behind, held_out, seconds)


def teach(loaded: Any, name: str, start_from: Path | None) -> tuple[float, float]:
    """Train by a lesson; the model stays compressed. Gives what was held out, before and behind."""
    from vispress.distillation.lessons import Pupil, find_lesson
    from vispress.distillation.scenes import training_prompts
    from vispress.registry import get_method

    minute, lesson = MINUTES[name], find_lesson(*name.split())
    method = get_method(lesson.method)(**minute.options)
    told: dict[str, Any] = {"steps": minute.steps, "lr": lesson.lr, "batch_size": minute.batch}
    shown = training_prompts(minute.samples)
    curve = lesson.teach(Pupil(loaded, method, shown, start_from=start_from, **told))
    before, behind = curve.held_out
    return before, behind


def main(words: Sequence[str] | None = None) -> None:
    """Print a line for each lesson."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lessons", nargs="*", metavar="LESSON", help="all by default")
    parser.add_argument("--out", type=Path, help="a file for the lines, too")
    parser.add_argument("--save", type=Path, help="a folder for the compressors")
    args = parser.parse_args(words)
    from vispress.bench.model.loaded_model import load_named_model

    loaded, lines = load_named_model("reference", "cpu", "fp32"), []
    for name in args.lessons or MINUTES:
        found = move(loaded, name, args.save)
        before, behind = found.held_out
        lines.append(
            f"{name:26} {found.before:5.1f} -> {found.behind:5.1f}   held out {before:.3f} -> "
            f"{behind:.3f}   {found.seconds:4.0f} CPU s"
        )
        print(lines[-1], flush=True)
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
