"""Schedules: published counts, solved ones, and what is refused; on PyramidDrop and TransPrune."""

from itertools import pairwise

import pytest

from vispress.budget import geometric_ratios
from vispress.errors import BudgetError, ConfigError
from vispress.methods import PyramidDrop, TransPrune
from vispress.methods._parts.schedules.stage_budgets import power_ratios
from vispress.types import Queries


def counts(method, num_visual=576, num_layers=32):
    return [p.budget.resolve(num_visual) for p in method.placements(num_layers)]


def layers(method, num_layers=32):
    return [p.layer for p in method.placements(num_layers)]


def mean_tokens(method, num_visual=576, num_layers=32):
    sizes = [num_visual, *counts(method, num_visual, num_layers)]
    starts = [0, *layers(method, num_layers), num_layers]
    return sum(n * (b - a) for n, (a, b) in zip(sizes, pairwise(starts), strict=True)) / num_layers


def test_published_counts_layers_and_means():
    assert counts(PyramidDrop()) == [288, 144, 72]
    assert layers(PyramidDrop()) == [8, 16, 24]
    assert mean_tokens(PyramidDrop()) == 270
    assert counts(TransPrune()) == [504, 360, 72]
    assert layers(TransPrune()) == [7, 9, 12]
    assert mean_tokens(TransPrune()) == 236.25
    assert counts(TransPrune(preset="low")) == [360, 108, 36]


def visual_tflops(sizes):
    """Multiply-adds of the visual tokens in LLaVA-1.5-7B's 32 layers, in T."""
    d, m = 4096, 11008
    return sum(4 * n * d**2 + 2 * n**2 * d + 3 * n * d * m for n in sizes) / 1e12


@pytest.mark.parametrize(
    ("method", "published"),
    [(TransPrune(), 1.56), (TransPrune(preset="low"), 1.19), (PyramidDrop(), 0.466 * 3.82)],
)
def test_published_flops_are_met(method, published):
    starts, sizes = [0, *layers(method), 32], [576, *counts(method)]
    per_layer = [n for n, (a, b) in zip(sizes, pairwise(starts), strict=True) for _ in range(b - a)]
    assert visual_tflops(per_layer) == pytest.approx(published, abs=0.01)


@pytest.mark.parametrize("mean", [0.3, 0.41015625, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("cls", [PyramidDrop, TransPrune])
def test_solved_schedules_have_the_mean_and_do_not_grow(cls, mean):
    method = cls(keep_ratio=mean)
    found = counts(method)
    assert found == sorted(found, reverse=True)
    assert mean_tokens(method) == pytest.approx(576 * mean, abs=1)
    assert counts(cls(mean_keep_ratio=mean)) == found


def test_the_published_point_lies_on_the_solved_family():
    ratios = power_ratios((0.875, 0.625, 0.125), 236.25 / 576, (7, 9, 12), 32)
    assert ratios == pytest.approx((0.875, 0.625, 0.125))
    # for a geometric schedule the family is the geometric one
    solved = power_ratios((0.5, 0.25, 0.125), 0.4, (8, 16, 24), 32)
    assert solved == pytest.approx(geometric_ratios(0.4, (8, 16, 24), 32))


def test_a_larger_mean_keeps_more_at_every_stage():
    found = [counts(TransPrune(keep_ratio=r / 20)) for r in range(6, 21)]
    assert all(a <= b for x, y in pairwise(found) for a, b in zip(x, y, strict=True))
    assert found[-1] == [576, 576, 576]


def test_a_mean_below_the_untouched_layers_is_refused():
    with pytest.raises(BudgetError, match="earlier `layers`"):
        PyramidDrop(keep_ratio=0.25).placements(32)
    with pytest.raises(BudgetError, match="before layer 7"):
        TransPrune(keep_ratio=0.2).placements(32)


def test_num_tokens_is_the_last_stage_and_the_others_keep_the_proportions():
    assert counts(PyramidDrop(num_tokens=72)) == [288, 144, 72]
    assert counts(PyramidDrop(num_tokens=200)) == [576, 400, 200]
    assert counts(TransPrune(num_tokens=64)) == [448, 320, 64]
    # an image with fewer tokens than a stage asks for passes it whole
    assert counts(PyramidDrop(num_tokens=64), num_visual=100) == [100, 100, 64]


def test_counts_are_truncated_shares_of_the_original():
    method = PyramidDrop(layers=(2, 4), ratios=(0.55, 0.33))
    assert counts(method, 105, 6) == [57, 34]


def test_layers_scale_with_depth():
    assert layers(PyramidDrop(), 40) == [10, 20, 30]
    assert layers(PyramidDrop(), 4) == [1, 2, 3]
    assert layers(TransPrune(), 28) == [6, 8, 10]
    assert [p.transitions for p in TransPrune().placements(28)][-1] == (5, 6, 7, 8, 9)
    with pytest.raises(ConfigError, match="at least 4 decoder layers"):
        PyramidDrop().placements(3)


def test_given_layers_halve_at_each_of_them():
    assert counts(PyramidDrop(layers=(1, 2, 3, 4)), 64, 6) == [32, 16, 8, 4]


def test_transitions_are_those_of_layers_that_have_run():
    first, second, third = TransPrune().placements(32)
    assert first.transitions == (6,)
    assert second.transitions == (6, 7, 8)
    assert third.transitions == (6, 7, 8, 9, 10, 11)
    assert {p.queries for p in (first, second, third)} == {Queries.TEXT_AFTER}


@pytest.mark.refusal
@pytest.mark.parametrize("cls", [PyramidDrop, TransPrune])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"layers": ()}, "layers must be a non-empty tuple"),
        ({"layers": [7, 9, 12]}, "layers must be a non-empty tuple"),
        ({"layers": (0, 8, 16)}, "layers must be an integer >= 1"),
        ({"layers": (8, 8, 16)}, "layers must be strictly ascending"),
        ({"layers": (8.5, 9, 10)}, "layers must be an integer"),
        ({"ratios": ()}, "ratios must be a non-empty tuple"),
        ({"ratios": (0.5, 0.6, 0.1)}, "ratios must not grow"),
        ({"ratios": (0.5, 0.25)}, "equally long"),
        ({"ratios": (0.5, 0.25, 0.0)}, "ratios must be a number"),
        ({"layers": (1, 2), "ratios": (0.5, 0.25, 0.1)}, "equally long"),
    ],
    ids=str,
)
def test_malformed_schedules_are_refused(cls, bad, message):
    with pytest.raises((ConfigError, BudgetError), match=message):
        cls(**bad)


def test_layers_beyond_the_depth_are_refused():
    with pytest.raises(ConfigError, match=r"layers must be an integer in \[1, 8\)"):
        PyramidDrop(layers=(2, 8)).placements(8)


@pytest.mark.parametrize("measured", [(7, 8), (6, 12), (0, 31)], ids=str)
def test_transition_layers_outside_the_stages_are_refused(measured):
    with pytest.raises(ConfigError, match="transition_layers must start before layer 7"):
        TransPrune(transition_layers=measured).placements(32)
