"""FrameFusion: the cap, runs, the prune and the mean over layers, by hand."""

from dataclasses import replace
from itertools import accumulate
from operator import mul

import pytest
import torch
from tests.methods.helpers import merged, only, take

from vispress.budget import ratio_left
from vispress.errors import BudgetError, ConfigError, UnsupportedMethodError
from vispress.methods import FrameFusion
from vispress.methods._parts.video.temporal_runs import likeness, run_starts
from vispress.methods.framefusion import MeanBudgetTracker, last_layer
from vispress.types import CropLayout, Queries, Stage


def cap(sparsity, mean=0.3, num_layers=28):
    """The share that a prune takes of what is left, after merges of these shares."""
    shares = list(accumulate((1 - s for s in sparsity), mul))
    return max(0.0, 1 - ratio_left(mean, shares, num_layers) / (shares[-1] if shares else 1.0))


@pytest.mark.parametrize(
    ("sparsity", "expected"), [([], 0.70), ([0.6], 0.259), ([0.5, 0.3, 0.05], 0.132), ([0.9], 0.0)]
)
def test_worked_examples_of_the_cap(sparsity, expected):
    assert cap(sparsity) == pytest.approx(expected, abs=5e-4)


def test_the_goal_is_what_the_cap_leaves():
    for sparsity in ([], [0.6], [0.5, 0.3, 0.05]):
        shares = tuple(accumulate((1 - s for s in sparsity), mul))
        left = (shares[-1] if shares else 1.0) * (1 - cap(sparsity))
        assert MeanBudgetTracker(shares).goal(0.3, 28, 10_000) == round(10_000 * left)


def video(angles, **signals):
    """Tokens `[1, F * t, 2]` of unit length at these angles (degrees), `[F][t]`."""
    a = torch.tensor(angles, dtype=torch.float64).deg2rad()
    x = torch.stack([a.cos(), a.sin()], dim=-1).flatten(0, 1)
    grid = (len(angles), 1, len(angles[0]))
    return only(features=x[None], grid=grid, depth=(0, 28), **signals)


# place 0 turns by 50 degrees, 60 and 10; place 1 by 40, 41 and 42; place 2 by 90
TURNS = [[0, 0, 0], [50, 40, 90], [110, 81, 180], [120, 123, 270]]


def test_runs_are_averaged_into_their_first_token():
    tokens = video(TURNS)
    plan = FrameFusion(keep_ratio=0.5, threshold=0.6).plan(tokens, 12)
    # cosines: .643 .5 .985 / .766 .755 .743 / 0 0 0: five of twelve are merged
    assert plan.keep.tolist() == [[0, 1, 2, 5, 6, 8, 11]]
    assert plan.assign.tolist() == [[0, 1, 2, 0, 1, 3, 4, 1, 5, 4, 1, 6]]
    new, x = merged(plan, tokens.features)[0], tokens.features[0]
    torch.testing.assert_close(new[1], x[1::3].mean(dim=0))  # a run of four
    torch.testing.assert_close(new[0], (x[0] + x[3]) / 2)
    torch.testing.assert_close(new[4], (x[6] + x[9]) / 2)
    assert torch.equal(new[[2, 3, 5, 6]], x[[2, 5, 8, 11]])
    (memory,) = plan.memory
    assert memory.value.merging
    assert not memory.over
    assert memory.value.shares == (7 / 12,)


def test_the_cap_keeps_the_most_alike_merges_and_ends_both():
    tokens = video(TURNS)
    plan = FrameFusion(keep_ratio=0.75).plan(tokens, 12)  # nine stay: three of five merges
    assert plan.keep.tolist() == [[0, 1, 2, 3, 5, 6, 8, 10, 11]]  # .985, .766, .755
    assert plan.memory[0].over


def test_what_is_merged_is_rounded_down():
    """The worked example of the vectors: a cap of 0.7 takes 89 of 128 tokens, not 89.6."""
    same = only(features=torch.ones(1, 128, 2), grid=(8, 4, 4), depth=(0, 28))
    assert FrameFusion(keep_ratio=0.3).plan(same, 128).counts == (39,)
    assert FrameFusion(num_tokens=38).plan(same, 128).counts == (38,)


def test_few_merges_end_merging_and_the_next_layer_prunes():
    turns = [[0] * 6, [50, 90, 90, 90, 90, 90]]
    tokens = video(turns)
    method = FrameFusion(keep_ratio=0.5)
    plan = method.plan(tokens, 12)
    assert plan.counts == (11,)  # one of twelve is less than a tenth
    assert (plan.memory[0].attention, plan.memory[0].value.merging) == (True, False)
    left = replace(take(replace(tokens, **EVERY), plan.keep), memory=plan.memory, num_entered=12)
    attention = torch.arange(11.0).flip(0)
    rows = torch.stack([attention * 2, attention * 0])[None, :, None]  # two heads
    left = replace(left, depth=(1, 28), query_attention=rows)
    plan = method.plan(left, 12)
    goal = round(12 * (14 - 11 / 12) / 27)
    assert plan.keep.tolist() == [list(range(goal))]
    assert plan.memory[0].over
    assert torch.equal(merged(plan, left.features)[0], left.features[0, :goal])


EVERY = {
    name: torch.zeros(1, 1, 12)
    for name in ("cls_attention", "column_attention", "cls_logits", "cls_wide_attention")
} | {
    "vision_keys": torch.zeros(1, 1, 12, 1),
    "vision_features": torch.zeros(1, 12, 1),
    "padding": torch.zeros(1, 12),
    "mean_attention": torch.zeros(1, 12),
    "encoder_groups": torch.zeros(1, 12, dtype=torch.int64),
}


def test_a_survivor_stands_for_its_run():
    place = torch.tensor([[0, 1, 0, 0, 1]])
    x = torch.tensor([[[1.0, 0], [0, 1], [1, 0], [0, 1], [0, 1]]])
    found = likeness(x, place)
    assert found.isneginf().tolist() == [[True, True, False, False, False]]
    torch.testing.assert_close(found[0, 2:], torch.tensor([1.0, 0, 1]))
    assert run_starts(found, place, [1]).tolist() == [[0, 1, 0, 3, 4]]  # ties: the earlier token
    assert run_starts(found, place, [2]).tolist() == [[0, 1, 0, 3, 1]]
    assert run_starts(found, place, [3]).tolist() == [[0, 1, 0, 0, 1]]


def test_newlines_are_not_merged_and_stay_within_the_budget():
    segment = torch.tensor([0, 0, 1, 1, -1])
    place = torch.tensor([0, 1, 0, 1, -1])
    crops = CropLayout(segment=segment, row=segment.clamp(max=0), col=place)
    same = only(features=torch.ones(1, 5, 2), crops=crops, depth=(0, 28))
    plan = FrameFusion(keep_ratio=0.6).plan(same, 5)
    assert plan.keep.tolist() == [[0, 1, 4]]
    scores = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0])[None, None, None]
    method, asked = FrameFusion(num_tokens=3), replace(same, query_attention=scores)
    assert method.plan(asked, 3).keep.tolist() == [[2, 3, 4]]
    assert method.plan(asked, 2).keep.tolist() == [[2, 3]]  # too few for it and a token a frame


@pytest.mark.some(cases=6)
@pytest.mark.parametrize("mean", [0.2, 0.3, 0.45, 0.8])
@pytest.mark.parametrize("num_layers", [6, 28, 32])
def test_the_mean_over_layers_is_met_whatever_the_video(mean, num_layers):
    g = torch.Generator().manual_seed(0)
    for case in range(40):
        budget = {"mean_keep_ratio" if case % 4 < 2 else "keep_ratio": mean}
        method = FrameFusion(**budget, least=0.0 if case % 2 else 0.1)
        places = {p.layer: p for p in method.placements(num_layers)}
        change = torch.rand((), generator=g) * 2
        x = torch.randn(1, 1, 10, 4, generator=g) + change * torch.randn(1, 8, 10, 4, generator=g)
        tokens = only(features=x.flatten(1, 2), grid=(8, 2, 5))
        counts, memory, over = [], (), False
        for layer in range(num_layers):
            if layer in places and not over:
                n = tokens.num_visual
                tokens = replace(
                    tokens, depth=(layer, num_layers), memory=memory, num_entered=80,
                    query_attention=torch.rand(1, 2, 1, n, generator=g),
                )  # fmt: skip
                if memory and not memory[0].attention:
                    tokens = replace(tokens, query_attention=None)
                most = places[layer].budget.resolve(80)
                if most < n or places[layer].adaptive:
                    plan = method.plan(tokens, most)
                    plan.check(tokens, most, exact=False)
                    plan.check_values(tokens)
                    assert plan.counts[0] <= most
                    memory, over = plan.memory, plan.memory[0].over
                    moved = merged(plan, tokens.features) if plan.assign is not None else None
                    features = tokens.features if moved is None else moved
                    # turned a little, as a layer would
                    noise = torch.randn(features.shape, generator=g)
                    index = tokens.index.gather(1, plan.keep)
                    tokens = replace(
                        tokens, features=features + 0.3 * noise, index=index, query_attention=None
                    )
            counts.append(tokens.num_visual)
        # what is merged is rounded down, what a prune keeps to the nearest
        excess = sum(counts) - mean * num_layers * 80
        assert -num_layers / 2 - 1 <= excess <= num_layers
        assert counts == sorted(counts, reverse=True)


def test_placements():
    first, *inside = FrameFusion().placements(28)
    assert (first.stage, first.layer, first.queries, first.adaptive) == (
        Stage.PRE_LLM, 0, None, True,
    )  # fmt: skip
    assert [p.layer for p in inside] == list(range(1, 9))
    assert {p.queries for p in inside} == {Queries.LAST}
    assert [p.budget.keep_ratio for p in inside] == [1.0] * 7 + [0.3]
    for rows in ("last_four", "all"):
        asked = FrameFusion(queries=rows).placements(28)[1:]
        assert {p.queries for p in asked} == {Queries(rows)}
    assert last_layer(0.3, 28) == 8
    assert FrameFusion(num_tokens=5).placements(28)[-1].budget.num_tokens == 5
    (whole,) = FrameFusion(keep_ratio=1.0).placements(28)
    assert not whole.adaptive


@pytest.mark.refusal
def test_a_mean_that_the_first_layer_uses_up_is_refused():
    with pytest.raises(BudgetError, match="cannot be reached"):
        FrameFusion(keep_ratio=0.03).placements(28)


@pytest.mark.refusal
def test_other_rows_are_refused():
    with pytest.raises(ConfigError, match="queries"):
        FrameFusion(queries="first")


@pytest.mark.refusal
def test_a_pruned_video_is_refused():
    tokens = video(TURNS)
    keep = torch.arange(11)[None]
    with pytest.raises(UnsupportedMethodError, match="whole images"):
        FrameFusion().plan(
            replace(tokens, features=tokens.features[:, :11], index=tokens.index.gather(1, keep)),
            11,
        )
