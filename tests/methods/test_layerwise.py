"""Layerwise: the sigmoid, its solution for a budget, and bundles of rates, by hand."""

from dataclasses import replace
from itertools import combinations, pairwise
from math import exp, fsum

import pytest
import torch
from tests.methods.helpers import make_tokens, only
from tests.methods.test_schedules import counts, layers, mean_tokens

from vispress.errors import BudgetError, ConfigError
from vispress.methods import Layerwise
from vispress.methods._parts.schedules.layer_ratios import (
    bundle,
    mean_ratio,
    sigmoid_ratios,
    solve_sigmoid,
)
from vispress.types import Queries


def sigmoid(layer, a=12.0, b=0.35, depth=32):
    return 1 / (1 + exp(a * (layer / depth - b)))


def test_worked_example_of_the_sigmoid():
    rates = sigmoid_ratios(12.0, 0.35, 0.0, 32)
    published = {0: 0.985, 8: 0.769, 11: 0.519, 16: 0.142, 24: 0.0082}
    first, last = sigmoid(0), sigmoid(32)
    for layer, value in published.items():
        assert sigmoid(layer) == pytest.approx(value, abs=5e-4)
        assert rates[layer] == pytest.approx((sigmoid(layer) - last) / (first - last))
    raised = sigmoid_ratios(12.0, 0.35, 0.1, 32)
    assert raised == pytest.approx([0.9 * rate + 0.1 for rate in rates])


@pytest.mark.parametrize("midpoint", [-1.0, 0.5, 2.0])
@pytest.mark.parametrize("steepness", [0.01, 40.0, 100.0])
def test_rates_fall_from_one_whatever_the_shape(steepness, midpoint):
    rates = sigmoid_ratios(steepness, midpoint, 0.05, 32)
    assert rates[0] == 1.0
    assert list(rates) == sorted(rates, reverse=True)
    assert rates[-1] >= 0.05


@pytest.mark.parametrize("target", [0.2, 0.5, 0.95, 1.0])
def test_the_sigmoid_is_solved_for_a_budget_of_any_kind(target):
    def quadratic(rates):
        return mean_ratio([rate * rate for rate in rates])

    for cost in (mean_ratio, quadratic):
        midpoint, floor = solve_sigmoid(8.0, 0.02, 32, cost, target)
        assert cost(sigmoid_ratios(8.0, midpoint, floor, 32)) == pytest.approx(target, abs=1e-9)
        assert (floor == 0.02) == (target < 0.87)


def test_a_budget_that_no_midpoint_meets_is_refused():
    with pytest.raises(BudgetError, match=r"at least 0\.100, the budget is 0\.050"):
        Layerwise(keep_ratio=0.05).placements(32)
    with pytest.raises(BudgetError, match="more than all tokens cost"):
        solve_sigmoid(8.0, 0.0, 32, mean_ratio, 1.1)


def test_a_bundle_is_the_best_cut_and_keeps_the_mean():
    rates = (1.0, 0.9, 0.895, 0.6, 0.595, 0.3, 0.1, 0.095)
    where, values = bundle(rates)
    assert (where, values) == ((1, 3, 5, 6), pytest.approx((0.8975, 0.5975, 0.3, 0.0975)))
    # one less than 1 % apart would be a placement for nothing: its layers join their neighbours
    assert len(bundle((1.0, 0.995, 0.5))[0]) == 1

    def error(starts):
        total = 0.0
        for a, b in pairwise((*starts, len(rates))):
            mean = fsum(rates[a:b]) / (b - a)
            total += fsum((rate - mean) ** 2 for rate in rates[a:b])
        return total

    best = min(combinations(range(2, len(rates)), 3), key=lambda rest: error((1, *rest)))
    assert where == (1, *best)


def test_at_most_eight_placements_and_the_mean_stays():
    rates = sigmoid_ratios(6.0, 0.4, 0.0, 80)
    where, values = bundle(rates)
    assert len(where) == 8
    spans = [b - a for a, b in pairwise((*where, 80))]
    mean = (where[0] + fsum(v * s for v, s in zip(values, spans, strict=True))) / 80
    assert mean == pytest.approx(mean_ratio(rates))


@pytest.mark.parametrize("mean", [0.2, 0.5, 0.9, 1.0])
def test_the_mean_is_met_and_one_keeps_all(mean):
    assert mean_tokens(Layerwise(keep_ratio=mean), 10_000) == pytest.approx(10_000 * mean, abs=1)
    assert counts(Layerwise(keep_ratio=1.0)) == [576]


def test_a_searched_schedule_is_taken_as_it_is():
    method = Layerwise(layers=(1, 5, 9), ratios=(0.9, 0.35, 0.0))
    assert (layers(method), counts(method)) == ([1, 5, 9], [519, 202, 0])
    assert {p.queries for p in method.placements(32)} == {Queries.LAST}
    asked = replace(method, queries="text").placements(32)
    assert {(p.queries, p.attention_of) for p in asked} == {(Queries.TEXT_AFTER, "previous")}
    with pytest.raises(ConfigError, match="layers"):
        method.placements(9)


def test_the_score_is_the_mean_of_attention():
    rows = torch.tensor([[[[0.2, 0.4], [0.0, 0.2]], [[0.4, 0.0], [0.2, 0.2]]]])
    torch.testing.assert_close(
        Layerwise(keep_ratio=0.5).score(only(query_attention=rows)), torch.tensor([[0.2, 0.2]])
    )
    tokens = make_tokens(1, 9)
    none = replace(tokens, query_attention=tokens.query_attention[:, :, :0], rotary_prior=None)
    assert Layerwise(keep_ratio=0.5).plan(none, 3).keep.tolist() == [[0, 1, 2]]


@pytest.mark.refusal
def test_what_does_not_go_together_is_refused():
    for bad, error, words in (
        ({"layers": (2,)}, ConfigError, "layers need ratios"),
        ({"ratios": (0.5,)}, ConfigError, "equally long"),
        ({"layers": (2, 3), "ratios": (0.0, 0.0)}, BudgetError, "ratios must be"),
        ({"layers": (2, 3), "ratios": (0.5, 0.6)}, ConfigError, "must not grow"),
        ({"layers": (2,), "ratios": (0.5,), "keep_ratio": 0.4}, BudgetError, "0.4"),
        ({"midpoint": 0.5, "num_tokens": 4}, BudgetError, "give ratios, a midpoint or a budget"),
        ({"steepness": 0.0}, ConfigError, "steepness"),
        ({"midpoint": 3.0}, ConfigError, "midpoint"),
        ({"floor": 1.5}, ConfigError, "floor"),
        ({"queries": "first"}, ConfigError, "queries"),
    ):
        with pytest.raises(error, match=words):
            Layerwise(**bad)
