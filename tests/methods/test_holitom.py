"""HoliTom: cuts, clusters beside the most attended, and the inner stage, by hand."""

from dataclasses import replace

import pytest
import torch
from tests.methods.helpers import make_tokens, merged, only, take

from vispress.errors import ConfigError, UnsupportedMethodError
from vispress.methods import HoliTom
from vispress.methods._parts.video.groups import (
    beside_top,
    centre_weights,
    mean_weights,
    saving_groups,
)
from vispress.methods._parts.video.scenes import saving_scenes
from vispress.methods.holitom import sequential_merge
from vispress.types import CropLayout, Queries, Stage

SIMILAR = torch.tensor(
    [[0.9, 0.9, 0.2, 0.95], [0.9, 0.5, 0.9, 0.95], [0.1, 0.9, 0.9, 0.95], [0.9, 0.9, 0.9, 0.95]]
)


def test_golden_cut():
    assert saving_scenes(SIMILAR > 0.8) == ([(0, 2), (2, 5)], 9)


def test_cuts_without_a_saving_are_single_frames():
    never = torch.zeros(3, 2, dtype=torch.bool)
    assert saving_scenes(never) == ([(0, 1), (1, 2), (2, 3), (3, 4)], 0)
    assert saving_scenes(never[:0]) == ([(0, 1)], 0)
    assert saving_scenes(~never) == ([(0, 4)], 6)
    # (0, 3), or (0, 2) and a frame: as much; the run that ends last is the shorter one
    same = torch.tensor([[1, 1], [1, 0]]).bool()
    assert saving_scenes(same) == ([(0, 2), (2, 3)], 2)


def brute(same):
    """The best saving over all cuts."""
    count = len(same) + 1
    best = 0
    for cuts in range(2 ** (count - 1)):
        ends = [i + 1 for i in range(count - 1) if cuts >> i & 1] + [count]
        starts, saved = [0, *ends[:-1]], 0
        for start, end in zip(starts, ends, strict=True):
            if end - start > 1:
                saved += (end - start - 1) * int(same[start : end - 1].all(dim=0).sum())
        best = max(best, saved)
    return best


@pytest.mark.parametrize("seed", range(5))
def test_no_cut_saves_more(seed):
    same = torch.rand(7, 6, generator=torch.Generator().manual_seed(seed)) < 0.7
    assert saving_scenes(same)[1] == brute(same)


def test_groups_are_what_stays_along_a_run_and_the_rest_of_each_frame():
    x = torch.zeros(5, 4, 2)
    angle = torch.zeros(5, 4)
    angle[1:] = torch.arccos(SIMILAR).cumsum(dim=0)
    x = torch.stack([angle.cos(), angle.sin()], dim=2)
    (found,) = saving_groups(x[None], 0.8)
    assert [(g.frame, g.length, g.places.tolist(), g.static) for g in found] == [
        (0, 2, [0, 1, 3], True), (0, 1, [2], False), (1, 1, [2], False),
        (2, 3, [1, 2, 3], True), (2, 1, [0], False), (3, 1, [0], False), (4, 1, [0], False),
    ]  # fmt: skip


def test_the_most_attended_stay_and_the_rest_is_clustered():
    x = torch.tensor([[0.0], [9.0], [0.1], [5.0], [5.1], [0.2]])
    score = torch.tensor([0.1, 0.9, 0.1, 0.2, 0.1, 0.1])
    owner = beside_top(x, score, 1, 2, 2)
    assert owner[1] == 1
    assert owner[0] == owner[2] == owner[5]
    assert owner[3] == owner[4]
    assert beside_top(x, score, 2, 0, 2).tolist() == [-1, 1, -1, 3, -1, -1]
    # 0.6 of the centre and 0.4 of the mean of the two others; PruneVid's are means of all three
    clusters = torch.tensor([0, 1, 0, -1, 4, 0])
    weights = centre_weights(clusters, 0.6)
    torch.testing.assert_close(weights[[0, 1, 2, 4, 5]], torch.tensor([0.6, 1.0, 0.2, 1.0, 0.2]))
    third = 1 / 3
    expected = torch.tensor([third, 1.0, third, 1.0, third])
    torch.testing.assert_close(mean_weights(clusters)[[0, 1, 2, 4, 5]], expected)


def test_a_centre_is_not_in_the_mean_beside_it():
    """The worked example of the vectors: (2, 1.2), where the mean of all three gives (2, 0.8)."""
    x = torch.tensor([[2.0, 0], [0, 0], [4, 6]])
    new = centre_weights(torch.tensor([0, 0, 0]), 0.6) @ x
    torch.testing.assert_close(new, torch.tensor([2.0, 1.2]))


def test_counts_of_the_code_without_a_budget():
    """Averages half to even, each frame's others up, as shares of what averaging leaves."""
    g = torch.Generator().manual_seed(0)
    still = torch.randn(1, 10, 4, generator=g).expand(4, 10, 4)
    x = torch.cat([still, torch.randn(4, 10, 4, generator=g)], dim=1)
    tokens = only(
        features=x.flatten(0, 1)[None], column_attention=torch.rand(1, 1, 80), grid=(4, 4, 5)
    )
    # 80 tokens, 30 saved: a quarter of all is 0.4 of the 50 left, 4 of ten averages and of others
    assert HoliTom(threshold=0.99).plan(tokens, 80).counts == (20,)
    # 0.3 of all is 0.48: round(4.8) averages, and ceil(4.8) of each frame
    assert HoliTom(threshold=0.99, retained=0.31).plan(tokens, 80).counts == (25,)
    assert HoliTom(threshold=0.99, retained=0.28).plan(tokens, 80).counts == (4 + 4 * 5,)
    assert HoliTom(threshold=0.99, retained=0.0).plan(tokens, 80).counts == (1,)
    assert HoliTom(threshold=0.99, max_window=1).plan(tokens, 80).counts == (4 * 5,)


def test_a_plan_by_hand():
    # place 0 stays the same over three frames, places 1 and 2 turn by a right angle each time
    turn = torch.tensor([[1.0, 0], [0, 1], [-1, 0]])
    x = torch.stack([torch.tensor([3.0, 0]).expand(3, 2), turn, turn.flip(1)], dim=1)
    x = x + torch.tensor([0.0, 0.3, -0.3])[:, None, None] * torch.tensor([1.0, 0, 0])[:, None]
    attention = torch.tensor([[0.1, 0.5, 0.2], [0.1, 0.2, 0.5], [0.1, 0.5, 0.2]]).flatten()
    tokens = only(
        features=x.flatten(0, 1)[None], column_attention=attention[None, None], grid=(3, 1, 3)
    )
    # one average and two a frame are seven; of four, the average keeps its place
    plan = HoliTom(keep_ratio=0.5).plan(tokens, 4)
    assert plan.keep.tolist() == [[0, 1, 5, 7]]
    new = merged(plan, tokens.features)[0]
    torch.testing.assert_close(new[0], x[:, 0].mean(dim=0))
    assert torch.equal(new[1:], tokens.features[0, [1, 5, 7]])
    # one cluster a frame: 0.6 of its centre and 0.4 of the other
    plan = HoliTom(context=1.0, keep_ratio=0.5).plan(tokens, 4)
    new, frame = merged(plan, tokens.features)[0], x[1, 1:]
    torch.testing.assert_close(new[2], 0.6 * frame[0] + 0.4 * frame[1])


def test_counts_of_a_frame_are_split_as_asked():
    tokens = replace(make_tokens(1, grid=(1, 6, 6)), query_attention=None)
    for count, most in ((10, 6), (8, 5)):  # 8 * 0.6 is rounded
        plan = HoliTom(threshold=1.0, context=0.4, num_tokens=count).plan(tokens, count)
        assert plan.counts == (count,)
        top = tokens.column_attention.mean(dim=1)[0].topk(most).indices.tolist()
        assert set(top) <= set(plan.keep[0].tolist())
        assert (plan.assign >= 0).all()  # nothing is lost


def test_averages_are_merged_even_where_frames_only_drop():
    still = torch.randn(1, 1, 6, 4, generator=torch.Generator().manual_seed(0)).expand(1, 3, 6, 4)
    tokens = only(
        features=still.flatten(1, 2), column_attention=torch.rand(1, 1, 18), grid=(3, 1, 6)
    )
    plan = HoliTom(num_tokens=2).plan(tokens, 2)
    assert plan.counts == (2,)
    assert (plan.assign >= 0).all()


def test_a_still_video_keeps_fewer_than_its_budget_and_others_all_of_it():
    g = torch.Generator().manual_seed(0)
    still = torch.randn(1, 1, 3, 4, generator=g).expand(1, 4, 3, 4)
    moving = torch.randn(1, 4, 3, 4, generator=g)
    features = torch.cat([still, moving]).flatten(1, 2)
    tokens = only(features=features, column_attention=torch.rand(2, 1, 12), grid=(4, 1, 3))
    plan = HoliTom(threshold=0.99, num_tokens=6).plan(tokens, 6)
    assert plan.counts == (3, 6)
    assert plan.keep[0].tolist() == [0, 1, 2]


def test_dropped_tokens_are_averaged_in_one_after_another():
    x = torch.tensor([[[1.0, 0], [2, 0], [0, 1], [4, 0.1], [8, 0.1], [0, 3]]])
    plan = sequential_merge(x, torch.tensor([[0, 2]]))
    first, second = x[0, 0], x[0, 2]
    for place in (1, 3, 4):
        first = (first + x[0, place]) / 2
    second = (second + x[0, 5]) / 2
    torch.testing.assert_close(merged(plan, x)[0], torch.stack([first, second]))
    # of two equal kept tokens both stay, the first takes in
    twins = torch.tensor([[[1.0, 0], [1, 0], [3, 0]]])
    plan = sequential_merge(twins, torch.tensor([[0, 1]]))
    assert merged(plan, twins).tolist() == [[[2.0, 0], [1, 0]]]
    # with random tokens, rows of their own
    x = torch.randn(2, 20, 4, generator=torch.Generator().manual_seed(0))
    keep = torch.tensor([[1, 4, 19], [0, 7, 8]])
    plan = sequential_merge(x, keep)
    direction = torch.nn.functional.normalize(x, dim=2)
    for b in range(2):
        new = x[b, keep[b]].clone()
        for place in sorted(set(range(20)) - set(keep[b].tolist())):
            slot = int((direction[b, keep[b]] @ direction[b, place]).argmax())
            new[slot] = (new[slot] + x[b, place]) / 2
        torch.testing.assert_close(merged(plan, x)[b], new)


def test_the_inner_stage_keeps_what_the_last_token_attends_to():
    tokens = make_tokens(2, grid=(2, 3, 4))
    plan = HoliTom(inner=True, num_tokens=5).plan(tokens, 5)
    top = tokens.query_attention.mean(dim=(1, 2)).topk(5).indices.sort(dim=1).values
    assert torch.equal(plan.keep, top)
    assert (plan.assign >= 0).all()
    # without it the first stage is meant
    assert not torch.equal(HoliTom(num_tokens=5).plan(tokens, 5).keep, top)
    # without a budget half of what is there stays
    assert HoliTom(inner=True).plan(tokens, 24).counts == (12, 12)


def test_placements():
    (only_one,) = HoliTom(keep_ratio=0.25).placements(28)
    assert only_one.stage is Stage.PRE_LLM
    first, second = HoliTom(keep_ratio=0.2, inner=True).placements(28)
    assert (second.layer, second.queries, second.attention_of) == (18, Queries.LAST, "previous")
    assert second.budget.keep_ratio == pytest.approx(first.budget.keep_ratio / 2)
    counts = [p.budget.resolve(1000) for p in HoliTom(num_tokens=30, inner=True).placements(28)]
    assert counts == [60, 30]
    first, second = HoliTom(inner=True).placements(28)
    assert (first.adaptive, second.adaptive, second.layer) == (True, True, 18)
    assert "query_attention" not in HoliTom().signals()
    assert "query_attention" in HoliTom(inner=True).signals()


def test_the_newline_is_kept_where_there_is_room():
    segment = torch.tensor([0, 0, 0, 1, 1, 1, -1])
    layout = CropLayout(segment=segment, row=segment.clamp(max=0), col=segment.clamp(max=0))
    tokens = make_tokens(crops=layout)
    plan = HoliTom(num_tokens=4).plan(tokens, 4)
    assert plan.keep[:, -1].tolist() == [6, 6]
    assert torch.equal(merged(plan, tokens.features)[:, -1], tokens.features[:, -1])


@pytest.mark.refusal
def test_what_cannot_be_done_is_refused():
    tokens = make_tokens(2, grid=(3, 2, 2))
    left = take(tokens, torch.tensor([[0, 1, 2, 5], [0, 4, 5, 6]]))
    with pytest.raises(UnsupportedMethodError, match="put it first"):
        HoliTom().plan(left, 2)
    with pytest.raises(ConfigError, match="give inner=True"):
        HoliTom(layer=3)
    for bad in (
        {"beta": 1.5},
        {"context": -0.1},
        {"retained": 2},
        {"max_window": 0},
        {"inner": 1},
        {"threshold": 2.0},
    ):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            HoliTom(**bad)
