"""Tasks: each has a card, and draws prompts that a model can be asked."""

import pytest

from vispress.bench.tasks.task import (
    EVIDENCE_GRID,
    Prompt,
    Task,
    all_tasks,
    get_task,
    register_task,
)
from vispress.errors import ConfigError
from vispress.reference.world.words import EPISODE_KINDS, KINDS, LARGE_KINDS


def test_the_fourteen_tasks_have_cards():
    names = (*KINDS, *EPISODE_KINDS)
    assert tuple(all_tasks())[:14] == names
    tasks = {name: all_tasks()[name] for name in names}
    for name, task in tasks.items():
        assert task.name == name
        assert len(task.needs.split()) > 2
        assert 0 < task.chance <= 0.5


@pytest.mark.parametrize("name", [*KINDS, *EPISODE_KINDS])
def test_prompts_have_pictures_marks_and_evidence(name):
    prompts = get_task(name).draw(3, 1)
    assert len(prompts) == 3
    for prompt in prompts:
        assert prompt.text.count("<image>") == len(prompt.images) == len(prompt.evidence)
        assert all(image.size == (96, 96) for image in prompt.images)
        cells = [cell for picture in prompt.evidence for cell in picture]
        assert all(0 <= cell < EVIDENCE_GRID**2 for cell in cells)
        assert cells or prompt.answer == "zero"
        assert bool(prompt.followups) == (name == "multi_turn")
    assert [p.text for p in get_task(name).draw(3, 1)] == [p.text for p in prompts]


@pytest.mark.parametrize("name", LARGE_KINDS)
def test_large_pictures_are_square_wide_and_tall(name):
    task = get_task(name)
    prompts = task.draw(3, 1)
    sizes = [prompt.images[0].size for prompt in prompts]
    assert sizes == [(192, 192), (192, 96), (96, 192)]
    for prompt in prompts:
        (cells,) = prompt.evidence
        assert cells
        assert 0 <= min(cells) <= max(cells) < EVIDENCE_GRID**2
    assert len(task.needs.split()) > 2
    assert 0 < task.chance <= 0.5


def test_pictures_a_prompt():
    pictures = {name: len(get_task(name).draw(1, 0)[0].images) for name in EPISODE_KINDS}
    assert pictures == {"compare": 2, "in_context": 3, "multi_turn": 1, "order": 3, "change": 3}


def test_the_answer_of_a_conversation_is_all_of_its_answers():
    turns = (("what color is the ring ? :", "red"), ("how many rings ? :", "one"))
    prompt = Prompt((), "<image> is there a red ring ? :", "yes", followups=turns)
    assert prompt.answer_text == "yes / red / one"
    assert Prompt((), "x", "top left").answer_text == "top left"


def test_names_are_taken_once():
    task = get_task("order")
    with pytest.raises(ConfigError, match="already registered"):
        register_task(Task("order", task.needs, task.chance, task.draw))
