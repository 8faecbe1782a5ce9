"""Gap closed, the hard subset, gain, leakage, turns and rankings: worked by hand."""

import math

import numpy as np
import pytest

from vispress.bench.results.compare import compare, rankings
from vispress.bench.results.derived_metrics import (
    accuracy_by_turn,
    gain,
    gap_closed,
    hard_subset,
    leakage,
)
from vispress.bench.results.ranking import rank
from vispress.bench.results.stats import bootstrap_mean, bootstrap_ratio, sign_flip_test
from vispress.bench.results.table import ranking_text


def cell(right, *, group="m", control=False, talk=None, ratio=0.5):
    """One finished cell; `right` by task, or of the task `t`."""
    by_task = right if isinstance(right, dict) else {"t": right}
    tasks = {task: {"right": flags, "answers": list(flags)} for task, flags in by_task.items()}
    if talk:
        tasks["t"]["turns"] = talk
    asked = {"group": group, "keep_ratio": ratio, "seed": None, "control": control}
    return {"cell": asked, "tasks": tasks}


def test_gap_closed_is_the_share_of_the_way_from_random_to_oracle():
    random = [cell("1000" * 25), cell("0100" * 25), cell("1100" * 25)]  # 1/3 right
    oracle = [cell("1111" * 25)]
    halfway = gap_closed([cell("1110" * 25)], random, oracle)
    assert halfway.mean == pytest.approx((0.75 - 1 / 3) / (1 - 1 / 3))
    assert halfway.low < halfway.mean < halfway.high
    assert gap_closed(random, random, oracle).mean == 0.0
    assert gap_closed(oracle, random, oracle).mean == 1.0
    # questions of all three are drawn together: the oracle's own share is certain
    assert gap_closed(oracle, random, oracle).low == 1.0
    assert gap_closed([cell("0" * 100)], random, oracle).mean == pytest.approx(-0.5)


def test_no_gap_no_share():
    random = [cell("10" * 20)]
    assert gap_closed([cell("1" * 40)], random, random) is None
    assert gap_closed([cell("1" * 40)], random, [cell("0" * 40)]) is None  # worse than random
    assert gap_closed([cell("1" * 40)], random, [cell("11" + "10" * 19)]) is None  # by chance


def test_the_hard_subset_is_what_a_smaller_picture_loses():
    base = cell({"a": "1101", "b": "11"})
    small = [cell({"a": "1000", "b": "11"})]
    # a: the second and fourth; the third is wrong for all
    got, count = hard_subset(
        [cell({"a": "1111", "b": "00"}), cell({"a": "0001", "b": "00"})], small, base
    )
    assert count == 2
    assert got.mean == pytest.approx((0.5 + 1.0) / 2)
    assert hard_subset(small, small, base)[0].mean == 0.0
    assert hard_subset(small, [cell({"a": "1111", "b": "11"})], base) == (None, 0)


def test_gain_is_accuracy_beyond_the_blind_model():
    by_task, mean = gain([cell({"a": "1111", "b": "1100"})], [cell({"a": "1000", "b": "1110"})])
    assert by_task["a"].mean == 0.75
    assert by_task["b"].mean == -0.25
    assert mean.mean == 0.25


def test_leakage_is_never_below_zero():
    blind = [cell({"a": "1110", "b": "1000"})]
    assert leakage(blind, {"a": 0.5, "b": 0.5}) == {"a": 0.25, "b": 0.0}


def test_turns_are_averaged_apart():
    cells = [cell("10", talk=["11", "10"]), cell("00", talk=["01", "00"])]
    assert [turn.mean for turn in accuracy_by_turn(cells)["t"]] == [0.75, 0.25]
    assert accuracy_by_turn([cell("10")]) == {}


def test_a_ratio_is_drawn_from_pairs():
    rng = np.random.default_rng(1)
    bottom = rng.integers(0, 2, 400).astype(float)
    together = [list(zip(bottom * 0.5, bottom, strict=True))]
    assert bootstrap_ratio(together).low == pytest.approx(0.5)
    shuffled = [list(zip(rng.permutation(bottom) * 0.5, bottom, strict=True))]
    spread = bootstrap_ratio(shuffled)
    assert spread.high - spread.low > 0.05
    with pytest.raises(ValueError, match="must be positive, got a mean of 0"):
        bootstrap_ratio([[(1.0, 0.0)]])


def test_drawing_counts_is_drawing_scores():
    """The spread of a bootstrap mean is that of the scores over the root of their number."""
    scores = [0.0] * 300 + [1 / 3] * 200 + [1.0] * 500
    interval = bootstrap_mean([scores], resamples=20_000)
    error = np.std(scores) / math.sqrt(1000)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.03)


def test_flips_beyond_counting_use_a_bound_that_holds():
    # all flips of 40 equal differences: 2 in 2**40, Hoeffding says 2 exp(-20)
    assert sign_flip_test([[1.0] * 40]) == pytest.approx(2 * math.exp(-20))
    assert sign_flip_test([[1.0] * 40]) > 2 / 2**40
    # unequal sizes: exact over the 8 patterns of +-3 +-2 +-1, of which 4 reach |3 + 2 - 1|
    assert sign_flip_test([[3.0, 2.0, -1.0]], flips=40_000) == pytest.approx(4 / 8, rel=0.03)


def strong(share, n=300):
    return [[float(i < share * n) for i in range(n)]]


def test_places_are_those_that_pairs_leave_open():
    ranking = rank({"low": strong(0.2), "top": strong(0.9), "next": strong(0.89)}, 0.5)
    found = {place.group: (place.first, place.last, place.tier) for place in ranking.places}
    # 3 of 300 questions differ, all to one side: 2 / 2**3 > 5 %
    assert [place.group for place in ranking.places] == ["top", "next", "low"]
    assert found == {"top": (1, 2, 1), "next": (1, 2, 1), "low": (3, 3, 2)}
    assert not ranking.tied
    text = ranking_text(ranking).plain
    assert (
        text.index("1-2  top") < text.index("1-2  next") < text.index("----") < text.index("3  low")
    )


def test_ties_have_no_order():
    ranking = rank({"a": strong(0.5), "b": strong(0.51)}, 0.25)
    assert ranking.tied
    assert {(place.first, place.last, place.tier) for place in ranking.places} == {(1, 2, 1)}
    assert "no pair differs significantly" in ranking_text(ranking).plain


def test_chains_of_small_steps_are_one_tier():
    """Neighbours tie, ends differ: no line can be drawn, but places are still bounded."""
    ranking = rank({"a": strong(0.5), "b": strong(0.485), "c": strong(0.47)}, 0.5)
    assert [(p.first, p.last, p.tier) for p in ranking.places] == [(1, 2, 1), (1, 3, 1), (2, 3, 1)]


def test_the_oracle_is_no_rival():
    cells = [
        cell("1" * 20, group="oracle", control=True),
        cell("10" * 10, group="random", control=True),
        cell("1110" * 5, group="m"),
    ]
    assert {c.control for c in compare(cells)} == {"random"}
    (ranking,) = rankings(cells)
    assert [place.group for place in ranking.places] == ["m", "random"]
