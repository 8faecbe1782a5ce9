"""Debiasing: what the correction does to scores, and which methods can be corrected."""

from dataclasses import replace

import pytest
import torch
from tests.methods.helpers import (
    adaptive_placements,
    like_fastv,
    make_tokens,
    only,
    take,
    with_scores,
)

from vispress.config import from_mapping, make_compressor, to_mapping
from vispress.errors import BudgetError, ConfigError
from vispress.methods import (
    Debias,
    DivPrune,
    FastV,
    PyramidDrop,
    RandomMix,
    SparseVLM,
    TransPrune,
    VScan,
)
from vispress.methods._parts.scoring.trend import FASTV_CURVE, trend_weight
from vispress.types import Signal

INNERS = [FastV(), PyramidDrop(), SparseVLM()]


def test_weights_of_the_worked_example():
    weight = Debias(slope=1.25).weight(with_scores([0.1] * 576))[0]
    assert weight[[0, 288, 575]].tolist() == pytest.approx([1.0, 0.535, 0.287], abs=5e-4)


def test_the_released_curve_of_fastv():
    weight = Debias().weight(with_scores([0.1] * 576))[0]
    listed = [1, 0.898, 0.849, 0.828, 0.818, 0.808, 0.787, 0.746, 0.685, 0.606, 0.519, 0.434]
    assert weight[::48].tolist() == pytest.approx(listed, abs=6e-4)
    assert float(weight[-1]) == pytest.approx(0.358, abs=6e-4)


def test_a_rising_trend_is_taken_out():
    # true content under exp(x), x = 0, 1/4, 1/2, 3/4: the last would win
    content = torch.tensor([0.3, 0.4, 0.2, 0.35])
    seen = content * torch.exp(torch.arange(4) / 4)
    tokens = only(query_attention=seen[None, None, None])
    assert FastV().plan(tokens, 1).keep.tolist() == [[3]]
    assert Debias(slope=1.0).plan(tokens, 1).keep.tolist() == [[1]]
    corrected = seen * Debias(slope=1.0).weight(tokens)[0]
    torch.testing.assert_close(corrected, content)


def test_a_slope_of_0_changes_nothing_and_a_negative_one_prefers_later_tokens():
    tokens = with_scores([0.25, 0.25, 0.25, 0.25])
    assert Debias(slope=0.0).plan(tokens, 2).keep.tolist() == [[0, 1]]
    assert Debias(slope=-1.0).plan(tokens, 2).keep.tolist() == [[2, 3]]


def padded(scores, share):
    return replace(with_scores(scores), padding=torch.tensor([share]))


def test_padding_is_kept_last_and_fills_a_budget_from_the_left():
    tokens = padded([0.9, 0.1, 0.2, 0.8], [1.0, 0.0, 0.0, 1.0])
    flat = Debias(slope=0.0)
    assert flat.plan(tokens, 2).keep.tolist() == [[1, 2]]
    assert flat.plan(tokens, 3).keep.tolist() == [[0, 1, 2]]
    assert Debias(slope=0.0, suppress_padding=False).plan(tokens, 2).keep.tolist() == [[0, 3]]


def test_shrink_keeps_no_padding():
    tokens = padded([0.9, 0.1, 0.2, 0.8], [1.0, 0.0, 0.0, 1.0])
    method = Debias(slope=0.0, shrink=True)
    assert [keep.tolist() for keep in method.plan(tokens, 3).keep] == [[1, 2]]
    assert method.plan(tokens, 4).keep.tolist() == [[0, 1, 2, 3]]  # all of it is the identity


def test_thresholds_are_the_patches():
    tokens = padded([0.4, 0.3, 0.2], [0.02, 0.5, 0.51])
    assert Debias().padded(tokens).tolist() == [[False, False, True]]
    wide = padded([0.4, 0.3, 0.2], [0.0, 0.01, 0.02])
    assert Debias(inner="pyramiddrop").padded(wide).tolist() == [[False, False, True]]
    assert Debias(threshold=0.4).padded(tokens).tolist() == [[False, True, True]]


def test_a_picture_that_is_padding_all_over_is_ranked_as_without():
    tokens = padded([0.1, 0.3, 0.2], [0.9, 0.8, 1.0])
    assert Debias(slope=0.0, shrink=True).plan(tokens, 1).keep[0].tolist() == [1]


@pytest.mark.parametrize("inner", INNERS, ids=lambda m: m.name)
def test_only_the_first_stage_is_corrected(inner):
    method = Debias(inner=inner, slope=8.0)
    whole = make_tokens(grid=(1, 4, 6), seed=3)
    first = torch.arange(24).expand(2, -1)[:, 4:]  # twenty are left
    later = take(whole, first)
    later = replace(later, query_attention=whole.query_attention[..., 4:], num_entered=24)
    assert method.plan(later, 6).keep.tolist() == inner.plan(later, 6).keep.tolist()
    # the same tokens where the method enters: others are kept
    entering = replace(later, num_entered=20)
    assert method.plan(entering, 6).keep.tolist() != inner.plan(entering, 6).keep.tolist()


def test_the_trend_runs_over_the_original_raster():
    index = torch.tensor([[0, 144, 432]])
    expected = torch.exp(-2.0 * index / 576)
    torch.testing.assert_close(trend_weight(index, 576, 2.0), expected)
    assert float(trend_weight(torch.zeros(1, 1, dtype=torch.int64), 1, FASTV_CURVE)) == 1.0


def test_it_acts_where_the_inner_method_acts():
    assert Debias(keep_ratio=0.5).placements(32) == FastV(keep_ratio=0.5).placements(32)
    assert Debias(inner="pyramiddrop").placements(32) == PyramidDrop().placements(32)
    assert Debias(inner=PyramidDrop()).default_positions == "compact"
    assert Debias().default_positions == "original"
    assert Debias(inner=SparseVLM()).merges
    assert Debias(inner=SparseVLM()).signals() == SparseVLM().signals() | {Signal.PADDING}
    assert Debias(suppress_padding=False).signals() == FastV().signals()
    assert Debias(shrink=True, num_tokens=9).placements(32)[0].adaptive
    assert not Debias(num_tokens=9).placements(32)[0].adaptive
    counts = like_fastv(adaptive=True, placements=adaptive_placements)
    assert Debias(inner=counts, num_tokens=9).placements(32)[0].adaptive
    assert [Debias(**one).adaptive for one in ({}, {"shrink": True}, {"inner": counts})] == [
        False,
        True,
        True,
    ]


def test_yaml_and_back():
    data = {
        "method": "debias",
        "slope": 1.5,
        "inner": {"method": "pyramiddrop", "layers": [4, 9], "ratios": [0.5, 0.2]},
    }
    method = from_mapping(data)
    assert method == Debias(slope=1.5, inner=PyramidDrop(layers=(4, 9), ratios=(0.5, 0.2)))
    assert from_mapping(to_mapping(method)) == method
    assert make_compressor("debias", inner="fastv", keep_ratio=0.5) == Debias(keep_ratio=0.5)
    with_curve = Debias(curve=(1.0, 0.5))
    assert from_mapping(to_mapping(with_curve)) == with_curve


def test_the_budget_is_one_wherever_it_is_given():
    inside, outside = Debias(inner=FastV(num_tokens=9)), Debias(num_tokens=9)
    assert inside == outside
    assert inside.inner.num_tokens is None
    assert inside.acting == FastV(num_tokens=9)
    with pytest.raises(BudgetError, match=r"give one budget.*keep_ratio.*num_tokens"):
        Debias(keep_ratio=0.5, inner=FastV(num_tokens=9))


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"inner": DivPrune()}, "divprune reads no attention of the LLM"),
        ({"inner": TransPrune()}, "fit one: vispress fit-debias --method transprune"),
        ({"inner": 3}, "a compressor or a method's name, got 3"),
        ({"slope": 1.0, "curve": (1.0,)}, "give slope or curve"),
        ({"slope": 51.0}, "slope must be a number in"),
        ({"slope": float("nan")}, "slope must be a number in"),
        ({"curve": (1.0, -2.0)}, "goes down to -1"),
        ({"curve": (1.0, float("nan"))}, "goes down to nan"),
        ({"curve": ()}, "non-empty tuple"),
        ({"threshold": 1.1}, "threshold must be a number in"),
        ({"shrink": True, "inner": SparseVLM()}, "shrink: sparsevlm merges"),
        ({"shrink": True, "inner": like_fastv(adaptive=True)}, "shrink: fastv merges or decides"),
        ({"shrink": 1}, "shrink must be true or false"),
        ({"suppress_padding": "no"}, "suppress_padding must be true or false"),
        ({"variant": "patch"}, "variant must be one of 'code', 'paper'"),
        ({"inner": Debias()}, "fastv is corrected by a debias inside"),
        ({"inner": RandomMix(inner=Debias())}, "fastv is corrected by a debias inside"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        Debias(**options)


@pytest.mark.refusal
def test_a_method_that_prunes_before_it_reads_attention_is_refused():
    with pytest.raises(ConfigError, match="vscan reads no attention at its first stage"):
        Debias(inner=VScan(keep_ratio=0.5), slope=1.0).placements(32)
    with pytest.raises(BudgetError, match="debias: fastv needs a budget"):
        Debias().placements(32)


def test_any_method_that_reads_attention_can_be_corrected_with_a_fitted_trend():
    method = Debias(inner=TransPrune(alpha=0.0), slope=8.0)
    tokens = make_tokens(grid=(1, 4, 6), seed=1)
    weighted = replace(
        tokens,
        query_attention=tokens.query_attention * method.weight(tokens)[:, None, None],
    )
    assert torch.equal(method.plan(tokens, 6).keep, TransPrune(alpha=0.0).plan(weighted, 6).keep)
