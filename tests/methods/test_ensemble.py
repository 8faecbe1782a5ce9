"""Ensemble: how scores are scaled and added, where parts may act, and what they are shown."""

from dataclasses import replace

import pytest
import torch
from tests.methods.helpers import anyres, make_tokens, only

from vispress.budget import Budget
from vispress.config import from_mapping, to_mapping
from vispress.errors import BudgetError, ConfigError
from vispress.methods import (
    DivPrune,
    Ensemble,
    FasterVLM,
    FastV,
    MaxNorm,
    PyramidDrop,
    Random,
    TransPrune,
)
from vispress.methods.ensemble import normalised
from vispress.types import Queries, Signal

TWO = (FasterVLM(), MaxNorm())


def two_kinds(attention, norms):
    """Tokens whose [CLS] attention and lengths are given."""
    features = torch.tensor(norms)[None, :, None]
    return only(cls_attention=torch.tensor(attention)[None, None], features=features)


def test_scores_are_scaled_before_they_are_added():
    tokens = two_kinds([0.0, 0.2, 0.4, 0.1], [30.0, 20.0, 10.0, 25.0])
    # minmax: [0, .5, 1, .25] and [1, .5, 0, .75]
    score = Ensemble(parts=TWO).score(tokens)[0]
    assert score.tolist() == pytest.approx([0.5, 0.5, 0.5, 0.5])
    weighted = Ensemble(parts=TWO, weights=(3.0, 1.0))
    assert weighted.score(tokens)[0].tolist() == pytest.approx([0.25, 0.5, 0.75, 0.375])
    assert weighted.plan(tokens, 2).keep.tolist() == [[1, 2]]
    # what counts is the ratio of weights
    assert Ensemble(parts=TWO, weights=(0.3, 0.1)).score(tokens)[0].tolist() == pytest.approx(
        [0.25, 0.5, 0.75, 0.375]
    )


def test_one_part_or_a_weight_of_0_is_the_method_itself():
    tokens = make_tokens(grid=(1, 4, 6))
    alone = FasterVLM().plan(tokens, 9).keep
    assert Ensemble(parts=("fastervlm",)).plan(tokens, 9).keep.equal(alone)
    for how in ("minmax", "rank"):
        method = Ensemble(parts=TWO, weights=(1.0, 0.0), normalise=how)
        assert method.plan(tokens, 9).keep.equal(alone)


def test_ranks_do_not_see_how_far_scores_are_apart():
    score = torch.tensor([[0.1, 0.9, 0.2, 0.2]])
    assert normalised(score, "rank")[0].tolist() == pytest.approx([0.25, 1.0, 0.75, 0.5])
    assert normalised(score**3, "rank").equal(normalised(score, "rank"))


def test_what_is_not_finite_counts_as_the_lowest():
    score = torch.tensor([[0.1, float("nan"), 0.3, float("-inf")]])
    assert normalised(score, "minmax")[0].tolist() == pytest.approx([0.0, 0.0, 1.0, 0.0])
    assert normalised(score, "rank")[0].tolist() == pytest.approx([0.75, 0.5, 1.0, 0.25])
    assert normalised(torch.full((1, 3), float("nan")), "minmax").shape == (1, 3)


def test_newlines_do_not_set_the_scale():
    layout = anyres(2, 1, 2)
    tokens = make_tokens(1, crops=layout)
    newline = layout.segment < 0
    features = tokens.features.masked_fill(newline[None, :, None], 1000.0)
    score = Ensemble(parts=("max_norm",)).score(replace(tokens, features=features))[0]
    assert float(score[~newline].max()) == pytest.approx(1.0)
    # the budget is split over sub-images, newlines first, as for the part alone
    plan = Ensemble(parts=("max_norm",)).plan(tokens, 9)
    assert plan.keep.equal(MaxNorm().plan(tokens, 9).keep)


def test_parts_are_shown_their_own_view():
    tokens = make_tokens(grid=(1, 4, 6))
    other = make_tokens(grid=(1, 4, 6), seed=9)
    shown = replace(tokens, cls_attention=None, views=(tokens, other))
    expected = 0.5 * normalised(FasterVLM().score(tokens), "minmax") + 0.5 * normalised(
        MaxNorm().score(other), "minmax"
    )
    torch.testing.assert_close(Ensemble(parts=TWO).score(shown), expected)


def test_placements_are_those_of_the_parts_with_one_budget():
    (placement,) = Ensemble(parts=("fastv", FastV()), num_tokens=9).placements(32)
    assert (placement.layer, placement.queries) == (2, Queries.LAST)
    assert placement.budget.resolve(576) == 9
    two = TransPrune(layers=(4,), ratios=(0.5,), transition_layers=(1, 2))
    four = replace(two, transition_layers=(3,))
    (placement,) = Ensemble(parts=(two, four), mean_keep_ratio=0.5).placements(32)
    assert placement.transitions == (1, 2, 3)
    assert Ensemble(parts=TWO).signals() == FasterVLM().signals() | MaxNorm().signals()
    assert Signal.CLS_ATTENTION in Ensemble(parts=TWO).signals()
    with pytest.raises(BudgetError, match="ensemble needs a budget"):
        Ensemble().placements(32)


def test_yaml_and_back():
    data = {
        "method": "ensemble",
        "weights": [1.0, 2.0],
        "parts": [{"method": "fastervlm"}, {"method": "vtc_cls", "start_layer": 3}],
    }
    method = from_mapping(data)
    assert method.parts[0] == FasterVLM()
    assert from_mapping(to_mapping(method)) == method


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"parts": ()}, "parts must be a non-empty tuple"),
        ({"parts": (DivPrune(),)}, "divprune does not rank tokens by a score alone"),
        ({"parts": (3,)}, "parts: 3 does not rank"),
        ({"parts": (FastV(keep_ratio=0.5),)}, "the budget is the ensemble's, fastv has its own"),
        ({"parts": TWO, "weights": (1.0,)}, "weights must be 2 numbers"),
        ({"parts": TWO, "weights": (1.0, -1.0)}, "weights must be a number in"),
        ({"parts": TWO, "weights": (0.0, 0.0)}, "weights must not all be 0"),
        ({"normalise": "softmax"}, "normalise must be one of 'minmax', 'rank'"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        Ensemble(**options)


@pytest.mark.refusal
@pytest.mark.parametrize(
    "parts", [(FastV(), MaxNorm()), (FastV(layer=2), FastV(layer=3)), (PyramidDrop(),)], ids=str
)
def test_parts_at_different_places_are_refused(parts):
    with pytest.raises(ConfigError, match="parts of an ensemble act once, at one place"):
        Ensemble(parts=parts, keep_ratio=0.5).placements(32)


def like_max_norm(places=None, **says):
    """A MaxNorm with other placements, given as changes to its own, or another class's word."""
    if places is not None:
        own = MaxNorm.placements
        says["placements"] = lambda part, num_layers: tuple(
            replace(own(part, num_layers)[0], **change) for change in places
        )
    return type("LikeMaxNorm", (MaxNorm,), says)()


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("places", "words"),
    [
        ([{}, {}], "max_norm before layer 0, 0$"),
        ([{"attention_of": "next"}], "differ in attention_of"),
        ([{"attention_depth": 2}], "differ in attention_depth"),
        ([{"probe": 1}], "differ in probe"),
        ([{"queries": Queries.LAST}], "differ in queries"),
        ([{"images": "last"}], "differ in images"),
        ([{"until": 3}], "differ in until"),
    ],
    ids=str,
)
def test_parts_that_need_something_else_shown_are_refused(places, words):
    with pytest.raises(ConfigError, match=words):
        Ensemble(parts=(MaxNorm(), like_max_norm(places)), keep_ratio=0.5).placements(32)


def test_what_parts_count_and_measure_may_differ():
    part = like_max_norm([{"budget": Budget(num_tokens=3), "adaptive": True, "transitions": (1,)}])
    (placement,) = Ensemble(parts=(MaxNorm(), part), num_tokens=9).placements(32)
    assert (placement.budget.num_tokens, placement.transitions) == (9, (1,))


@pytest.mark.parametrize("turn", [1, -1])
@pytest.mark.parametrize(("says", "value"), [("needs", "video"), ("per_segment", True)], ids=str)
def test_what_one_part_needs_all_need(says, value, turn):
    plain = like_max_norm(needs=None, per_segment=False)
    parts = (plain, like_max_norm(**({"per_segment": False} | {says: value})))[::turn]
    assert getattr(Ensemble(parts=parts), says) == value
    assert not getattr(Ensemble(parts=(plain, plain)), says)


def test_positions_are_the_first_parts():
    two = like_max_norm(default_positions="original"), like_max_norm(default_positions="compact")
    assert Ensemble(parts=two).default_positions == "original"
    assert Ensemble(parts=two[::-1]).default_positions == "compact"


def test_random_parts_add_noise():
    tokens = make_tokens(grid=(1, 6, 8))
    noisy = Ensemble(parts=("max_norm", Random(seed=1)), weights=(1.0, 0.5))
    assert not noisy.plan(tokens, 20).keep.equal(MaxNorm().plan(tokens, 20).keep)
