"""FastV: what is kept, where, and what is refused."""

import pytest
from tests.methods.helpers import with_scores

from vispress.errors import BudgetError, ConfigError
from vispress.methods import FastV
from vispress.types import Queries, Stage


def test_keeps_the_most_attended_in_original_order():
    tokens = with_scores([0.2, 0.5, 0.1, 0.4])
    assert FastV().plan(tokens, num_keep=2).keep.tolist() == [[1, 3]]


def test_ranking_of_the_golden_vectors():
    # descending: 0, 4, 7, 2, 6, 5, 1, 3; the tie of 4 and 7 goes to 4
    tokens = with_scores([0.20, 0.05, 0.15, 0.02, 0.18, 0.10, 0.12, 0.18])
    keeps = [FastV().plan(tokens, k).keep[0].tolist() for k in (1, 2, 3, 5)]
    assert keeps == [[0], [0, 4], [0, 4, 7], [0, 2, 4, 6, 7]]


def test_nan_is_kept_last():
    tokens = with_scores([float("nan"), 0.1, 0.3])
    assert FastV().plan(tokens, 2).keep.tolist() == [[1, 2]]


def test_prunes_once_before_the_layer():
    (placement,) = FastV(keep_ratio=0.25, layer=3).placements(num_layers=32)
    assert (placement.stage, placement.layer) == (Stage.IN_LLM, 3)
    assert (placement.queries, placement.attention_of) == (Queries.LAST, "previous")
    assert placement.budget.resolve(576) == 144


@pytest.mark.parametrize(("depth", "layer"), [(32, 2), (40, 2), (80, 5), (16, 1), (4, 1), (2, 1)])
def test_the_published_layer_is_scaled_by_depth(depth, layer):
    assert FastV(keep_ratio=0.5).placements(depth)[0].layer == layer


def test_half_counts_round_to_even_as_in_the_official_code():
    (placement,) = FastV(keep_ratio=0.5).placements(32)
    assert [placement.budget.resolve(n) for n in (105, 107)] == [52, 54]


def test_mean_keep_ratio_counts_the_layers_before():
    (placement,) = FastV(mean_keep_ratio=0.5, layer=8).placements(32)
    # (8 * 1 + 24 * x) / 32 = 0.5
    assert placement.budget.keep_ratio == pytest.approx(1 / 3)
    with pytest.raises(BudgetError, match="cannot be reached"):
        FastV(mean_keep_ratio=0.2, layer=8).placements(32)


@pytest.mark.refusal
@pytest.mark.parametrize("bad", [0, -1, True, 2.0])
def test_bad_layers_are_refused(bad):
    with pytest.raises(ConfigError, match="layer"):
        FastV(layer=bad)


def test_a_layer_beyond_the_depth_is_refused():
    with pytest.raises(ConfigError, match=r"layer must be an integer in \[1, 32\)"):
        FastV(keep_ratio=0.5, layer=32).placements(32)


def test_a_budget_is_needed():
    with pytest.raises(BudgetError, match="fastv needs a budget"):
        FastV().placements(32)
