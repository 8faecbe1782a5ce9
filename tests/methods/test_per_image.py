"""Per-image budgets: which image gets how much, and what cannot be weighted."""

from dataclasses import replace

import pytest
import torch
from tests.methods.helpers import (
    NOT_TO_A_BUDGET,
    adaptive_placements,
    like_fastv,
    make_tokens,
    single,
)

from vispress.config import from_mapping, to_mapping
from vispress.errors import ConfigError
from vispress.methods import AvgPool, DivPrune, FastV, PerImage, PyramidDrop, SparseVLM, TransPrune
from vispress.methods.per_image import select_images
from vispress.types import Memory


@pytest.mark.parametrize("inner", [FastV(), DivPrune(), TransPrune()], ids=lambda m: m.name)
def test_each_image_keeps_what_the_method_keeps_of_it_at_its_own_count(inner):
    tokens = replace(make_tokens(4, grid=(1, 4, 6)), image_number=torch.tensor([0, 1, 0, 5]))
    plan = PerImage(inner=inner, factors=(1.0, 0.25)).plan(tokens, 12)
    assert plan.counts == (12, 3, 12, 3)
    for row, count in enumerate(plan.counts):
        assert plan.keep[row].equal(inner.plan(single(tokens, row), count).keep[0])


def test_counts_are_at_least_1_and_at_most_all():
    tokens = replace(make_tokens(2, grid=(1, 4, 6)), image_number=torch.tensor([0, 1]))
    plan = PerImage(factors=(0.01, 1.0)).plan(tokens, 30)
    assert plan.counts == (1, 24)
    assert plan.keep[1].tolist() == list(range(24))


def test_equal_factors_of_1_are_the_method_itself():
    tokens = make_tokens(grid=(1, 4, 6))
    plain = PerImage(inner=SparseVLM())
    assert not plain.adaptive
    assert PerImage(factors=(0.5,)).adaptive
    counts = like_fastv(adaptive=True, placements=adaptive_placements)
    own = PerImage(inner=counts, keep_ratio=0.5)  # allowed without factors, and said
    assert own.adaptive
    assert own.placements(32)[0].adaptive
    assert not PerImage(keep_ratio=0.5).placements(32)[0].adaptive
    assert plain.signals() == SparseVLM().signals()
    assert PerImage().plan(tokens, 9).keep.equal(FastV().plan(tokens, 9).keep)


def test_it_acts_where_the_inner_method_acts():
    method = PerImage(inner=PyramidDrop(), factors=(1.0, 0.5))
    assert [p.layer for p in method.placements(32)] == [8, 16, 24]
    assert all(p.adaptive for p in method.placements(32))
    assert from_mapping(to_mapping(method)) == method


def test_rows_of_a_bucket_hold_what_each_image_has():
    tokens = make_tokens(3, grid=(1, 4, 6))
    memory = tuple(Memory(value=number) for number in range(3))
    picked = select_images(replace(tokens, views=(tokens,), memory=memory), [2, 0])
    assert picked.memory == (memory[2], memory[0])
    assert picked.features.equal(tokens.features[[2, 0]])
    assert picked.views[0].index.shape == (2, 24)
    assert picked.transition[1].cosine.equal(tokens.transition[1].cosine[[2, 0]])
    assert (picked.grid, picked.projector) == (tokens.grid, tokens.projector)


@pytest.mark.refusal
@pytest.mark.parametrize("inner", [SparseVLM(), AvgPool()], ids=lambda m: m.name)
def test_what_merges_or_counts_for_itself_is_refused(inner):
    with pytest.raises(ConfigError, match=f"inner: {inner.name} merges, or does not keep"):
        PerImage(inner=inner, factors=(0.5, 1.0))


@pytest.mark.refusal
@pytest.mark.parametrize(("says", "value"), [("merges", True), *NOT_TO_A_BUDGET.items()], ids=str)
def test_each_reason_alone_is_refused(says, value):
    with pytest.raises(ConfigError, match="inner: fastv merges, or does not keep exactly"):
        PerImage(inner=like_fastv(**{says: value}), factors=(0.5, 1.0))


@pytest.mark.refusal
def test_placements_that_count_for_themselves_are_refused():
    counts = like_fastv(placements=adaptive_placements)
    with pytest.raises(ConfigError, match="inner: fastv decides its own counts; give it a budget"):
        PerImage(inner=counts, factors=(0.5, 1.0), keep_ratio=0.5).placements(32)


@pytest.mark.refusal
@pytest.mark.parametrize(
    "factors", [(), (0.0,), (1.0, -1.0), 2.0, (1.5,), (float("nan"),)], ids=str
)
def test_bad_factors_are_refused(factors):
    with pytest.raises(ConfigError, match="factors"):
        PerImage(factors=factors)
