"""Law 18: about a minute of each lesson on the reference model, and more answers are right.

By `make full`: each takes its minute. By default tests of lessons hold that each lowers what it
measures. `python -m benchmarks.lessons` prints what each brings; margins are at most half of that.
"""

import pytest
from benchmarks.lessons import MINUTES, move

from vispress.bench.model.loaded_model import load_named_model
from vispress.distillation.lessons import all_lessons


def test_every_lesson_has_its_minute() -> None:
    assert set(MINUTES) == {f"{one.method} {one.stage}" for one in all_lessons()}


@pytest.mark.full
@pytest.mark.parametrize("name", MINUTES)
def test_a_minute_of_training_brings_right_answers(name: str) -> None:
    moved = move(load_named_model("reference", "cpu", "fp32"), name)
    assert moved.held_out[1] < moved.held_out[0]
    assert moved.behind - moved.before > MINUTES[name].margin, moved
