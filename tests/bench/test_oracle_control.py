"""The oracle keeps what holds the answer, and never another count than asked."""

import pytest
import torch
from tests.tiny import Image, Sample, Text, build, make_inputs

from vispress import compressed
from vispress.adapters.base import find_adapter
from vispress.bench.plan.oracle import Oracle, choose_tokens, evidence_tokens, with_evidence
from vispress.bench.tasks.task import Prompt, get_task
from vispress.errors import BudgetError, ConfigError, UnsupportedMethodError


def tokens(cells, grid):
    return evidence_tokens(cells, (1, *grid)).nonzero()[:, 0].tolist()


def test_evidence_on_the_models_own_grid():
    assert tokens([0, 13, 143], (12, 12)) == [0, 13, 143]
    # a token of 2 x 2 cells
    assert tokens([13, 14], (6, 6)) == [0, 1]
    # four tokens a cell
    assert tokens([1], (24, 24)) == [2, 3, 26, 27]
    # cell 1 spans 1/12 to 2/12: part of the first and of the second token of 8
    assert tokens([1], (8, 8)) == [0, 1]
    # it ends where the second of 6 begins
    assert tokens([1], (6, 12)) == [1]
    assert tokens([12], (4, 3)) == [0]
    assert tokens([], (5, 7)) == []


@pytest.mark.parametrize("grid", [(12, 12), (7, 9), (4, 4), (24, 24)])
@pytest.mark.parametrize("count", [0, 1, 5, 40, 144])
def test_the_count_is_exact_and_evidence_comes_first(grid, count):
    cells = torch.randperm(144, generator=torch.Generator().manual_seed(count))[:count].tolist()
    needed = set(tokens(cells, grid))
    for num_keep in (1, 2, 7, 15, grid[0] * grid[1] - 1):
        keep = choose_tokens(cells, (1, *grid), num_keep).tolist()
        assert keep == sorted(set(keep))
        assert len(keep) == num_keep
        assert needed <= set(keep) if len(needed) <= num_keep else set(keep) <= needed


def test_what_is_left_is_spread_over_the_grid():
    keep = choose_tokens([0], (1, 12, 12), 10)
    assert 0 in keep
    # 9 more: the middles of thirds
    assert keep.tolist()[1:] == [
        26 + 48 * row + 4 * column for row in range(3) for column in range(3)
    ]


def test_too_much_evidence_is_thinned_evenly():
    assert choose_tokens(range(0, 100), (1, 12, 12), 4).tolist() == [12, 37, 62, 87]


def oracle_report(model, inputs, prompts, **budget):
    method = with_evidence(Oracle(**budget), model, inputs, prompts)
    with compressed(model, method) as view, torch.no_grad():
        model(**inputs)
        return [image for sample in view.report.samples for image in sample.images]


def test_each_picture_of_a_batch_keeps_its_own_evidence(subject):
    prompts = get_task("relation").draw(3, 0) + get_task("attribute").draw(3, 0)
    first, second = prompts[0], prompts[4]
    prompts.append(
        Prompt(
            (*first.images, *second.images),
            "<image> <image> what color is the circle ? :",
            "red",
            (first.evidence[0], second.evidence[0]),
        )
    )
    images = oracle_report(subject.model, subject.encode(prompts), prompts, num_tokens=40)
    evidence = [cells for prompt in prompts for cells in prompt.evidence]
    assert len(set(evidence)) > 3
    for image, cells in zip(images, evidence, strict=True):
        assert image.kept == tuple(choose_tokens(cells, (1, 12, 12), 40).tolist())
        assert set(cells) <= set(image.kept)


def test_pictures_of_different_grids_are_told_apart():
    model = build("qwen2_5_vl")
    samples = [
        Sample([Text(4), Image(4, 6), Text(3), Image(6, 4), Text(2)]),
        Sample([Text(2), Image(6, 4), Text(5)]),
        Sample([Text(2), Image(4, 6), Text(9)]),
    ]
    inputs = make_inputs("qwen2_5_vl", samples, padding="left")
    evidence = [((0,), (143,)), ((1, 2, 3),), ((66,),)]
    prompts = [Prompt((None,) * len(own), "", "", own) for own in evidence]
    grids = find_adapter(model).picture_grids("image", inputs)
    assert grids == [(1, 4, 6), (1, 6, 4), (1, 6, 4), (1, 4, 6)]
    images = oracle_report(model, inputs, prompts, keep_ratio=0.25)
    for image, grid, cells in zip(images, grids, [c for own in evidence for c in own], strict=True):
        assert image.kept == tuple(choose_tokens(cells, grid, 6).tolist())


def test_questions_without_evidence_are_refused(subject):
    prompt = get_task("count").draw(1, 0)[0]
    unknown = Prompt(prompt.images, prompt.text, prompt.answer)
    inputs = subject.encode([unknown])
    with pytest.raises(UnsupportedMethodError, match=r"which part of the picture.*how many"):
        with_evidence(Oracle(keep_ratio=0.5), subject.model, inputs, [unknown])
    odd = Prompt(prompt.images, prompt.text, prompt.answer, ((1,), (2,)))
    with pytest.raises(ConfigError, match="evidence of 2 pictures and 1"):
        with_evidence(Oracle(keep_ratio=0.5), subject.model, inputs, [odd])
    wrong = Prompt(prompt.images, prompt.text, prompt.answer, ((144,),))
    with pytest.raises(ConfigError, match=r"in \[0, 144\), got 144"):
        oracle_report(subject.model, inputs, [wrong], keep_ratio=0.5)


def test_cut_pictures_are_refused_with_what_works():
    model = build("llava_next")
    with pytest.raises(
        UnsupportedMethodError, match=r"llava_next does not have; it works on .*llava"
    ):
        with_evidence(Oracle(keep_ratio=0.5), model, {}, [])


def test_nothing_is_kept_without_being_told(subject):
    inputs = subject.encode(get_task("count").draw(1, 0))
    with (
        pytest.raises(UnsupportedMethodError, match="needs the evidence"),
        compressed(subject.model, Oracle(keep_ratio=0.5)),
        torch.no_grad(),
    ):
        subject.model(**inputs)
    with pytest.raises(BudgetError, match="oracle needs a budget"):
        Oracle().placements(6)
