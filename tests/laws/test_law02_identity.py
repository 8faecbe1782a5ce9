"""Law 2: what keeps every token is the untouched model, bit for bit."""

from typing import Any

import pytest
import torch
from tests.laws.cases import (
    BUDGETED,
    FAMILIES,
    cases,
    greedy,
    inputs_of,
    logits_of,
    model_of,
    settings,
)
from tests.tiny import cache_by_prompts
from torch import Tensor

from vispress import compressed
from vispress.methods import DivPrune, FastV, PyramidDrop

PLENTY = 10_000


@cache_by_prompts
def untouched(family: str, padding: str = "left") -> tuple[Tensor, Tensor, Tensor]:
    """Logits, generated sequences and their logits without compression."""
    model, inputs = model_of(family), inputs_of(family, padding)
    return logits_of(model, inputs), *greedy(model, inputs)


def whole(family: str, method: str, **budget: Any) -> dict[str, Any]:
    """Settings of a case with this budget in place of the usual one."""
    kept = {k: v for k, v in settings(family, method).items() if k != "keep_ratio"}
    return kept | budget


def assert_untouched(family: str, options: dict[str, Any], padding: str = "left") -> None:
    model, inputs = model_of(family), inputs_of(family, padding)
    logits, sequences, steps = untouched(family, padding)
    with compressed(model, **options) as report:
        assert torch.equal(logits_of(model, inputs), logits)
        for image in (i for sample in report.samples for i in sample.images):
            assert image.kept == tuple(range(image.num_visual))
        assert report.mean_keep_ratio == 1.0
        got_sequences, got_steps = greedy(model, inputs)
        assert torch.equal(got_sequences, sequences)
        assert torch.equal(got_steps, steps)


@pytest.mark.parametrize(("family", "method"), cases(2, BUDGETED))
def test_a_ratio_of_one_changes_no_bit(family: str, method: str) -> None:
    assert_untouched(family, {"method": method} | whole(family, method, keep_ratio=1.0))


@pytest.mark.parametrize(("family", "method"), cases("plenty", BUDGETED))
def test_more_tokens_than_an_image_has_change_no_bit(family: str, method: str) -> None:
    assert_untouched(family, {"method": method} | whole(family, method, num_tokens=PLENTY))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mean_ratio_of_one_changes_no_bit(family: str) -> None:
    assert_untouched(family, {"method": "fastv", "mean_keep_ratio": 1.0, "layer": 2})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chain_that_keeps_everything_changes_no_bit_under_right_padding(family: str) -> None:
    chain = [DivPrune(keep_ratio=1.0), FastV(num_tokens=PLENTY), PyramidDrop(keep_ratio=1.0)]
    assert_untouched(family, {"method": chain}, padding="right")


def test_an_image_within_the_budget_stays_whole_beside_one_that_is_cut() -> None:
    """Per image: only the larger one loses tokens, and the report says so."""
    model, inputs = model_of("qwen2_vl"), inputs_of("qwen2_vl")
    with compressed(model, "divprune", num_tokens=20) as report:
        logits_of(model, inputs)
        sizes = [(i.num_visual, i.num_kept) for sample in report.samples for i in sample.images]
    assert sizes == [(16, 16), (24, 20), (24, 20)]


def test_one_token_less_is_noticed() -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    expected = untouched("llava")[0]
    with compressed(model, "random", num_tokens=35):
        assert not torch.equal(logits_of(model, inputs), expected)
