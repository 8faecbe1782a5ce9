"""The notes of a report: methods that changed nothing in a call are named, with the reason."""

from typing import Any

import pytest
import torch
from tests.laws.cases import (
    BUDGETED,
    MASKING,
    METHODS,
    VIDEO_ONLY,
    inputs_of,
    logits_of,
    make,
    model_of,
    settings,
)
from tests.laws.test_law10_training import labels_of
from tests.tiny import Image, Sample, Text, Video, make_inputs

from vispress import compressed, compression_report
from vispress.methods.cache_evictor import CacheEvictor
from vispress.registry import get_method

TELLING = {*MASKING, *(m for m in METHODS if issubclass(get_method(m), CacheEvictor))}
"""Methods that drop no row; their stages have notes of their own."""
NOTHING = "dropped nothing in this call"


def idle(report: Any) -> list[str]:
    return [note for note in report.notes if "nothing in this call" in note]


@pytest.mark.some(cases=24)
@pytest.mark.parametrize("budget", [{"keep_ratio": 1.0}, {"num_tokens": 10**6}])
@pytest.mark.parametrize(("family", "method"), {m: (f, m) for f, m in BUDGETED}.values())
def test_a_budget_that_holds_everything_is_noted_and_a_smaller_one_is_not(
    family: str, method: str, budget: dict[str, Any]
) -> None:
    model, inputs = model_of(family), inputs_of(family)
    expected = logits_of(model, inputs)
    given = settings(family, method) | {"keep_ratio": None} | budget
    given = {name: value for name, value in given.items() if value is not None}
    with compressed(model, method, **given) as report:
        found = logits_of(model, inputs)
        kinds = ("dropped", "merged")
        wanted = [f"{method}: {kind} nothing in this call; its budget holds all" for kind in kinds]
        if method in TELLING:
            assert not idle(report)
        else:
            assert torch.equal(found, expected)
            assert idle(report)
            assert all(note.startswith(tuple(wanted)) for note in idle(report))
    with compressed(model, make(family, method)) as report:
        logits_of(model, inputs)
        assert not idle(report)


@pytest.mark.parametrize("method", [m for m in METHODS if get_method(m).trained])
def test_a_method_is_untrained_until_its_parameters_move(method: str) -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    acting = make("llava", method)
    chain = ["divprune", acting]
    if acting.whole or acting.changes_encoder():  # it acts first
        chain.reverse()
    with compressed(model, chain, mean_keep_ratio=0.3) as report:
        logits_of(model, inputs)
        (note,) = (note for note in report.notes if "untrained" in note)
        assert note.startswith(f"{method}: untrained")
        assert note.endswith(f" with, and {acting.untrained}")
        moved = next(p for n, p in model.named_parameters() if "vispress_modules" in n)
        with torch.no_grad():
            moved[0] += 1.0
        assert not any("untrained" in note for note in report.notes)
    with compressed(model, "divprune", keep_ratio=0.5) as report:
        logits_of(model, inputs)
        assert not any("untrained" in note for note in report.notes)


def test_a_pool_that_is_untrained_averages_and_says_so() -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    with compressed(model, make("llava", "pvc")) as report:
        logits_of(model, inputs)
        (note,) = (note for note in report.notes if "untrained" in note)
        assert note.endswith(", and it averages each window")


def test_each_method_of_a_chain_is_named_for_itself() -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    whole, half = make("llava", "divprune", keep_ratio=1.0), make("llava", "fastv")
    with compressed(model, [whole, half]) as report:
        logits_of(model, inputs)
        assert idle(report) == [f"divprune: {NOTHING}; its budget holds all visual tokens"]


def test_the_note_is_of_the_call_and_not_of_the_model() -> None:
    """A picture with fewer tokens than the budget, then one with more."""
    model = model_of("qwen2_5_vl")
    small, large = (
        make_inputs("qwen2_5_vl", [Sample([Text(3), Image(side, side), Text(4)])])
        for side in (2, 6)
    )
    with compressed(model, "fastv", num_tokens=10) as report:
        logits_of(model, small)
        assert idle(report)
        logits_of(model, large)
        assert not idle(report)


@pytest.mark.parametrize("method", sorted(VIDEO_ONLY))
def test_images_that_pass_a_method_for_videos_are_noted(method: str) -> None:
    model = model_of("qwen2_vl")
    image, video = (
        make_inputs("qwen2_vl", [Sample([Text(3), part, Text(4)])])
        for part in (Image(4, 4), Video(3, 4, 4))
    )
    with compressed(model, make("qwen2_vl", method)):
        logits_of(model, image)
        assert any("made for videos" in note for note in idle(compression_report(model)))
        logits_of(model, video)
        assert not idle(compression_report(model))


def test_a_prompt_that_nothing_asks_is_noted() -> None:
    """Labels without a supervised token: what ranks by the prompt leaves its images whole."""
    model, inputs = model_of("llava"), inputs_of("llava")
    nothing = torch.full_like(labels_of(inputs), -100)
    with compressed(model, "fastv", keep_ratio=0.5) as report:
        model(**inputs, labels=nothing)
        assert idle(report) == [f"fastv: {NOTHING}; no prompt asks about the images"]
        assert not [note for note in report.notes if "pass whole" in note]  # said once
        asked = nothing.clone()
        asked[0, -1] = inputs["input_ids"][0, -1]
        model(**inputs, labels=asked)
        assert not idle(report)
        whole = [note for note in report.notes if "pass whole" in note]
        assert len(whole) == 1
        assert whole[0].startswith("fastv: 2 of 3 images pass whole")
