"""Paired tests, Holm's correction and loyalty: worked by hand, and on stored cells."""

import numpy as np
import pytest

from vispress.bench.results.compare import compare, loyalty, versus
from vispress.bench.results.stats import bootstrap_difference, holm, sign_flip_test
from vispress.bench.results.summary import summarise, write_summary
from vispress.bench.results.table import tables


def cell(group, right, *, method="fastv", ratio=0.5, seed=None, answers=None):
    tasks = {"t": {"right": right, "answers": answers or list(right)}}
    methods = [{"method": method, "keep_ratio": 0.5}] if method else []
    asked = {"group": group, "keep_ratio": ratio, "seed": seed, "methods": methods}
    asked["control"] = method in ("random", "uniform")
    return {"cell": asked, "tasks": tasks}


def test_holm_by_hand():
    # 3 * .01, then 2 * .02 and 1 * .03, never falling below the one before
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_sign_flips_of_six_equal_differences_are_exact():
    # 2 of 64 sign patterns are as extreme
    p = sign_flip_test([[1.0] * 6], flips=20_000)
    assert p == pytest.approx(2 / 64, rel=0.2)
    assert sign_flip_test([[1.0] * 6], flips=500) == sign_flip_test([[1.0] * 6], flips=500)


def test_no_difference_is_no_evidence():
    assert sign_flip_test([[0.0] * 9]) == 1.0
    assert sign_flip_test([[1.0, -1.0] * 20]) == 1.0


def test_false_alarms_are_as_rare_as_promised():
    rng = np.random.default_rng(0)
    draws = [rng.integers(-1, 2, (2, 40)).astype(float) for _ in range(200)]
    alarms = sum(sign_flip_test(list(map(list, gaps)), flips=400) < 0.05 for gaps in draws)
    assert alarms <= 20  # 10 expected, standard deviation 3


def test_tasks_weigh_the_same_whatever_their_size():
    gap = bootstrap_difference([[1.0] * 2, [0.0] * 100])
    assert gap.mean == 0.5
    assert gap.low == gap.high == 0.5
    with pytest.raises(ValueError, match="every stratum"):
        bootstrap_difference([[], [1.0]])


def test_methods_meet_random_and_the_best_control_at_their_own_budget():
    cells = [
        cell("good", "1" * 40),
        cell("same", "10" * 20),
        cell("random", "10" * 20, method="random", seed=0),
        cell("random", "01" * 20, method="random", seed=1),
        cell("uniform", "1110" * 10, method="uniform"),
        cell("good", "0" * 40, ratio=0.25),  # no control at this budget
        {"cell": cell("lost", "", method="fastv")["cell"], "refused": "cannot"},
    ]
    found = {(c.group, c.against): c for c in compare(cells)}
    assert set(found) == {(m, a) for m in ("good", "same") for a in ("random", "best control")}
    assert found["good", "random"].difference.mean == pytest.approx(0.5)
    assert found["good", "best control"].control == "uniform"
    assert found["good", "best control"].difference.mean == pytest.approx(0.25)
    assert found["good", "random"].significant
    assert not found["same", "random"].significant
    assert found["same", "best control"].difference.mean == pytest.approx(-0.25)
    assert all(c.p_holm >= c.p for c in found.values())


def test_one_method_meets_every_other_but_the_oracle():
    cells = [
        cell("ours", "1" * 40),
        cell("good", "1110" * 10),
        cell("random", "10" * 20, method="random", seed=0),
        cell("random", "01" * 20, method="random", seed=1),
        cell("oracle", "1" * 40, method="random"),
        cell("good", "1" * 40, ratio=0.25),  # ours is not there
        {"cell": cell("lost", "", method="fastv")["cell"], "refused": "cannot"},
    ]
    found = versus(cells, "ours")
    assert [(c.keep_ratio, c.control) for c in found] == [(0.5, "good"), (0.5, "random")]
    assert [c.difference.mean for c in found] == pytest.approx([0.25, 0.5])
    assert [c.p_holm for c in found] == pytest.approx(holm([c.p for c in found]))
    assert {(c.group, c.against) for c in found} == {("ours", "every other")}


def test_random_as_the_best_control_is_met_once():
    cells = [
        cell("m", "10"),
        cell("random", "11", method="random"),
        cell("u", "00", method="uniform"),
    ]
    assert [(c.against, c.control) for c in compare(cells)] == [("random", "random")]


def test_loyalty_counts_equal_answers_right_or_wrong():
    base = cell("none", "10", method=None, ratio=None, answers=["red", "two"])
    seeds = [
        cell("m", "10", answers=["red", "two"], seed=0),
        cell("m", "00", answers=["blue", "two"], seed=1),
    ]
    assert loyalty(seeds, base) == [[0.5, 1.0]]


@pytest.mark.slow
def test_a_run_reports_loyalty_and_comparisons(make_plan, tmp_path):
    from rich.console import Console

    from vispress.bench.run.engine import run

    run(make_plan(), tmp_path)
    summary = summarise(tmp_path)
    rows = {row.group: row for row in summary.rows}
    assert rows["none"].loyalty.mean == 1.0
    assert 0 <= rows["fastv"].loyalty.mean <= 1
    # no_image has no keep ratio, so it is never a control at equal budget
    assert {(c.group, c.control) for c in summary.comparisons} == {("fastv", "random")}
    write_summary(summary, tmp_path)
    assert "loyalty" in (tmp_path / "summary.csv").read_text().splitlines()[0]
    console = Console(width=140, record=True)
    console.print(tables(summary))
    assert "methods less controls" in console.export_text()
