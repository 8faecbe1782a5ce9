"""ADSC: steps, lattices and schedules, by hand."""

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from tests.methods.helpers import anyres, make_tokens, map_tensors, take
from tests.methods.test_schedules import counts, layers, mean_tokens

from vispress.errors import BudgetError, ConfigError
from vispress.methods import ADSC
from vispress.methods._parts.geometry.grid_thinning import thin_run
from vispress.methods._parts.schedules.stage_budgets import solve_layers


def stages(method, tokens, num_layers=32):
    """Kept places of every stage, as the runtime asks for them."""
    found = []
    for placement in method.placements(num_layers):
        num_keep = placement.budget.resolve(tokens.num_original)
        keep = method.plan(tokens, num_keep).keep
        tokens = take(tokens, keep)
        found.append(tokens.index[0].tolist())
    return found


@pytest.mark.parametrize(
    ("preset", "where", "sizes", "mean"),
    [
        (192, [4, 10, 18], [288, 144, 72], 193.5),
        (128, [2, 5, 9], [288, 144, 72], 132.75),
        (64, [1, 2, 3, 6], [288, 144, 72, 36], 67.5),
    ],
)
def test_reference_schedules(preset, where, sizes, mean):
    method = ADSC(preset=preset)
    assert (layers(method), counts(method), mean_tokens(method)) == (where, sizes, mean)


def test_the_last_of_each_group_stays():
    assert thin_run(6, 3, "last").tolist() == [1, 3, 5]
    assert thin_run(6, 3, "first").tolist() == [0, 2, 4]
    # 7 = 3 groups of 2 and one over; 5 of 7 is no stride: equal groups
    assert thin_run(7, 3, "last").tolist() == [1, 3, 5]
    assert thin_run(7, 5, "last").tolist() == [0, 1, 3, 4, 6]
    assert thin_run(7, 5, "first").tolist() == [0, 1, 2, 4, 5]
    for count in range(1, 40):
        for keep in range(1, count + 1):
            for offset in ("first", "last"):
                found = thin_run(count, keep, offset)
                assert found.tolist() == sorted(set(found.tolist()))
                assert (len(found), bool((found < count).all())) == (keep, True)


def test_along_the_raster():
    first, second, third = stages(ADSC(mode="1d"), make_tokens(grid=(1, 4, 6)))
    assert first == list(range(1, 24, 2))
    assert second == list(range(3, 24, 4))
    assert third == list(range(7, 24, 8))
    (first, *_) = stages(ADSC(mode="1d", offset="first"), make_tokens(grid=(1, 4, 6)))
    assert first == list(range(0, 24, 2))


def test_the_lattice_is_thinned_along_columns_and_rows_in_turn():
    first, second, third = stages(ADSC(), make_tokens(grid=(1, 24, 24)))
    assert first == [24 * r + c for r in range(24) for c in range(1, 24, 2)]
    assert second == [24 * r + c for r in range(1, 24, 2) for c in range(1, 24, 2)]
    assert third == [24 * r + c for r in range(1, 24, 2) for c in range(3, 24, 4)]


def test_a_small_count_is_thinned_along_both_axes():
    tokens = make_tokens(grid=(1, 24, 24))
    (keep, *_) = ADSC().plan(tokens, 36).keep
    assert keep.tolist() == [24 * r + c for r in range(3, 24, 4) for c in range(3, 24, 4)]
    assert ADSC().plan(tokens, 1).keep.shape == (2, 1)


def test_a_count_that_no_lattice_has_is_met_and_spread():
    (keep, *_) = ADSC().plan(make_tokens(grid=(1, 4, 6)), 14).keep
    per_row = torch.bincount(keep // 6, minlength=4)
    assert per_row.tolist() == [3, 4, 3, 4]


def test_crops_and_frames_are_thinned_on_their_own_and_newlines_stay():
    tokens = make_tokens(crops=anyres(4, 1, 2))
    segment = tokens.crops.segment
    newlines = int((segment == -1).sum())
    (keep, *_) = ADSC().plan(tokens, newlines + 24).keep
    assert torch.bincount(segment[keep] + 1).tolist() == [newlines, 8, 8, 8]
    for part in range(3):
        assert set(tokens.crops.col[keep[segment[keep] == part]].tolist()) == {1, 3}
    video = make_tokens(grid=(3, 4, 4))
    (keep, *_) = ADSC().plan(video, 24).keep
    assert (keep // 16).bincount().tolist() == [8, 8, 8]


def test_images_that_were_pruned_apart_are_thinned_apart():
    tokens = make_tokens(grid=(1, 4, 6))
    keep = torch.stack([torch.arange(12), torch.arange(0, 24, 2)])
    left = take(tokens, keep)
    plan = ADSC().plan(left, 6)
    assert left.index.gather(1, plan.keep).tolist() == [
        [1, 3, 5, 7, 9, 11],
        # rows are the denser axis now
        [6, 8, 10, 18, 20, 22],
    ]


def test_later_stages_know_what_was_left_without_a_look_at_it():
    tokens = make_tokens(grid=(1, 4, 6))
    first = ADSC().plan(tokens, 12)
    left = take(tokens, first.keep)
    told = replace(left, memory=first.memory)
    expected = ADSC().plan(left, 6).keep
    assert torch.equal(ADSC().plan(told, 6).keep, expected)
    # meta tensors have no values: reading one on the host is an error
    hidden = map_tensors(told, lambda t: t.to("meta"))
    assert ADSC().plan(hidden, 6).counts == (6, 6)


def test_what_another_method_dropped_since_is_looked_up():
    tokens = make_tokens(grid=(1, 4, 6))
    first = ADSC().plan(tokens, 12)
    left = take(take(tokens, first.keep), torch.arange(3, 11).expand(2, -1))
    told = replace(left, memory=first.memory)
    assert torch.equal(ADSC().plan(told, 4).keep, ADSC().plan(left, 4).keep)


@pytest.mark.parametrize("depth", [6, 12, 32])
@pytest.mark.parametrize("mean", [0.4, 0.6, 0.85])
def test_solved_layers_are_the_closest_of_all(mean, depth):
    def error(found):
        spans = pairwise((0, *found, depth))
        return abs(sum((b - a) * 0.5**i for i, (a, b) in enumerate(spans)) / depth - mean)

    best = min(map(error, combinations(range(1, depth), 3)))
    assert error(solve_layers(mean, 2, depth)) == pytest.approx(best, abs=1e-9)


def test_solved_layers_spread_and_more_come_where_three_are_too_few():
    assert solve_layers(192 / 576, 2, 32) == (4, 10, 17)
    assert solve_layers(128 / 576, 2, 32) == (2, 5, 7)
    found = solve_layers(0.08, 2, 32)
    assert len(found) > 3
    assert list(found) == sorted(set(found))


@pytest.mark.parametrize("mean", [0.1, 64 / 576, 1 / 3, 0.6, 0.95, 1.0])
def test_the_mean_is_met_with_solved_layers_and_with_given_ones(mean):
    assert mean_tokens(ADSC(keep_ratio=mean), 10_000) == pytest.approx(10_000 * mean, abs=2)
    given = ADSC(mean_keep_ratio=mean, layers=(2, 9))
    assert layers(given) == [2, 9]
    assert mean_tokens(given, 10_000) == pytest.approx(10_000 * mean, abs=2)


def test_a_mean_that_no_schedule_has_is_refused():
    with pytest.raises(BudgetError, match=r"minimum is 0\.062"):
        ADSC(keep_ratio=0.05).placements(32)


@pytest.mark.refusal
def test_bad_hyper_parameters_are_refused():
    for bad in (
        {"preset": 96},
        {"layers": (3, 2)},
        {"stride": 1},
        {"offset": "middle"},
        {"mode": "3d"},
    ):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            ADSC(**bad)


def test_a_reverse_curriculum_passes_harsher_presets_and_ends_at_the_target():
    method = ADSC(curriculum="reverse")
    passed = [method.at(progress).preset for progress in (0.0, 0.3, 0.34, 0.6, 0.67, 1.0)]
    assert passed == [64, 64, 128, 128, 192, 192]
    assert method.at(0.9) is method
    forward = replace(method, curriculum="forward", preset=64)
    assert [forward.at(p).preset for p in (0.0, 0.5, 1.0)] == [192, 128, 64]
    assert ADSC().at(0.0) == ADSC()
    # what the target has passed is left out: one stage before it
    asked = ADSC(keep_ratio=0.2, curriculum="reverse")
    assert [asked.at(p).keep_ratio for p in (0.0, 0.49, 0.5, 1.0)] == [64 / 576, 64 / 576, 0.2, 0.2]
    mean = ADSC(mean_keep_ratio=0.1, curriculum="reverse")
    assert mean.at(0.0) is mean
    assert mean_tokens(asked.at(0.0)) == pytest.approx(64, abs=1)


@pytest.mark.refusal
def test_a_curriculum_solves_its_own_layers():
    for fixed in ({"layers": (4, 10)}, {"num_tokens": 64}):
        with pytest.raises(ConfigError, match="curriculum='reverse' solves layers"):
            ADSC(curriculum="reverse", **fixed)
    with pytest.raises(ConfigError, match="curriculum"):
        ADSC(curriculum="backwards")
