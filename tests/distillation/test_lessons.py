"""Which lessons there are, and how one is found."""

from dataclasses import replace

import pytest

from vispress.distillation import lessons
from vispress.distillation.lessons import add_lesson, all_lessons, find_lesson
from vispress.errors import ConfigError
from vispress.registry import get_method


def test_every_lesson_is_of_a_method_with_parameters() -> None:
    pairs = [(one.method, one.stage) for one in all_lessons()]
    assert len(set(pairs)) == len(pairs)
    assert all(get_method(method).trained for method, _ in pairs)


def test_the_first_stage_is_the_default() -> None:
    assert find_lesson("covipal").stage == "attention"
    assert find_lesson("covipal", "answers").stage == "answers"
    assert find_lesson("vision_selector").stage == "answers"
    assert find_lesson("relevance_dpp").stage == "attention"
    with pytest.raises(ConfigError, match=r"stage must be one of 'attention', 'attention-shares'"):
        find_lesson("covipal", "answer")


def test_others_add_theirs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lessons, "_ADDED", [])
    mine = replace(find_lesson("vision_selector"), stage="mine")
    assert add_lesson(mine) is find_lesson("vision_selector", "mine")
    with pytest.raises(ConfigError, match="has a stage 'mine' of training already"):
        add_lesson(mine)
