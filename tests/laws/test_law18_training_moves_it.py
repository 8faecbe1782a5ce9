"""Law 18: about a minute of each lesson on the reference model, and more answers are right.

Margins are at most half of what a run with these settings gained.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from benchmarks.relevance import SEED, share_right

from vispress import compress_model, remove_compression, save_compression
from vispress.bench.model.loaded_model import LoadedModel, load_named_model
from vispress.distillation.lessons import Pupil, all_lessons, find_lesson
from vispress.distillation.scenes import training_prompts
from vispress.registry import get_method

QUESTIONS = 90


@dataclass(frozen=True)
class Minute:
    """What about a minute of one core is spent on.

    Args:
        options: Of the method.
        samples: Prompts.
        steps: Of the optimiser.
        margin: Percent of right answers that training must bring.
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
    "relevance_dpp attention": Minute({"num_tokens": 8}, 1000, 150, 6.0),
    "sd_rpn regions": Minute({"layer": 1, "num_tokens": 16}, 160, 60, 12.0),
    "vision_selector answers": Minute({"num_tokens": 16}, 640, 80, 30.0),
    "xai_compress relevance": Minute({"num_tokens": 16}, 400, 150, 5.0),
}


BY_DEFAULT = "sd_rpn regions"


def test_every_lesson_has_its_minute() -> None:
    assert set(MINUTES) == {f"{one.method} {one.stage}" for one in all_lessons()}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_named_model("reference", "cpu", "fp32")


def taught(loaded: LoadedModel, name: str, start_from: Path | None) -> None:
    """Train by a lesson; the model stays compressed."""
    minute, lesson = MINUTES[name], find_lesson(*name.split())
    method = get_method(lesson.method)(**minute.options)
    told: dict[str, Any] = {"steps": minute.steps, "lr": lesson.lr, "batch_size": minute.batch}
    shown = training_prompts(minute.samples)
    curve = lesson.teach(Pupil(loaded, method, shown, start_from=start_from, **told))
    assert curve.held_out[1] < curve.held_out[0]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == BY_DEFAULT else pytest.mark.full) for n in MINUTES],
)
def test_a_minute_of_training_brings_right_answers(
    loaded: LoadedModel, name: str, tmp_path: Path
) -> None:
    minute, start_from = MINUTES[name], None
    asked = list(training_prompts(QUESTIONS, SEED))
    try:
        if minute.behind:
            taught(loaded, minute.behind, None)
            start_from = tmp_path / "behind"
            save_compression(loaded.model, start_from)
        else:
            method = get_method(name.split()[0])
            compress_model(loaded.model, method(**minute.options))
        before = share_right(loaded, asked)
        remove_compression(loaded.model)
        taught(loaded, name, start_from)
        after = share_right(loaded, asked)
    finally:
        remove_compression(loaded.model)
    assert after - before > minute.margin, f"{before:.1f} before, {after:.1f} behind"
