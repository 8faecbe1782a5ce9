"""PruneVid: scenes, averages, clusters and the second stage, by hand."""

from dataclasses import replace

import pytest
import torch
from tests.methods.helpers import make_tokens, merged, only, take

from vispress.errors import ConfigError, UnsupportedMethodError
from vispress.methods import PruneVid
from vispress.methods._parts.scoring.cosines import unit
from vispress.methods._parts.video.groups import (
    alike,
    clusters,
    groups_of,
    mean_weights,
    shares,
    static_groups,
)  # fmt: skip
from vispress.methods._parts.video.scenes import refined, scenes_of
from vispress.methods.prunevid import top_of_groups
from vispress.types import CropLayout, Queries, Stage

SMALL = torch.eye(4)[:3]  # three tokens of a frame, at right angles


def video(*rows):
    """A bucket of one video per list of frames."""
    x = torch.stack([torch.stack(frames) for frames in rows])
    return only(features=x.flatten(1, 2), grid=(x.shape[1], 1, x.shape[2]))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, 0, 1, 0, 2, 2, 2, 1, 1, 2], [0, 0, 2, 2, 2, 2, 2, 1, 1, 1]),
        ([0, 1, 2, 3], [0, 0, 0, 0]),
        ([0, 0, 0, 1, 0, 2, 2], [0, 0, 0, 0, 0, 2, 2]),
        ([0, 0, 1, 2, 2], [0, 0, 0, 2, 2]),  # equally long: the left one
        ([5], [5]),
        # a run is longer by what has joined it: six frames to five, not three
        ([2, 0, 0, 1, 1, 1, 2, 0, 0, 0, 0, 0], [1] * 7 + [0] * 5),
    ],
)
def test_golden_scenes(labels, expected):
    assert refined(labels) == expected


def test_scenes_are_runs():
    assert scenes_of([0, 0, 2, 2, 2, 1]) == [(0, 2), (2, 5), (5, 6)]


def test_a_place_is_as_much_alike_as_its_frames_are_on_average():
    x = unit(torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0)))
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    expected = torch.stack([(x[i] * x[j]).sum(1) for i, j in pairs]).mean(0)
    torch.testing.assert_close(alike(x), expected)
    assert (alike(x[:1]) < -1).all()  # a lone frame is never static, whatever the threshold


def test_groups_of_a_video():
    static = torch.tensor([[1, 0, 1]] * 2 + [[0, 0, 0]] + [[1, 1, 1]] * 2).bool()
    found = groups_of([(0, 2), (2, 3), (3, 5)], static, torch.device("cpu"))
    assert [(g.frame, g.length, g.places.tolist(), g.static) for g in found] == [
        (0, 2, [0, 2], True), (0, 1, [1], False), (1, 1, [1], False),
        (2, 1, [0, 1, 2], False),
        (3, 2, [0, 1, 2], True),
    ]  # fmt: skip


def test_four_frames_are_one_scene_and_eight_are_two():
    dark = SMALL + torch.tensor([0, 0, 0, 5.0])
    (found,) = static_groups(torch.stack([SMALL] * 4 + [dark] * 4)[None], 0.25, 0.8, 7)
    assert [(g.frame, g.length, len(g.places)) for g in found] == [(0, 4, 3), (4, 4, 3)]
    (found,) = static_groups(torch.stack([SMALL] * 3)[None], 0.25, 0.8, 7)
    assert [(g.frame, g.length) for g in found] == [(0, 3)]


def test_published_counts_of_groups():
    static = torch.zeros(2, 30, dtype=torch.bool)
    static[:, :14] = True
    groups = groups_of([(0, 2)], static, torch.device("cpu"))
    assert shares(groups, 60, 0.5) == (14, 8, 8)
    assert shares(groups, 60, 0.3) == (14, 4, 4)  # truncated
    # a budget has all groups to the same share
    assert shares(groups, 23) == (7, 8, 8)


def test_what_stays_the_same_is_averaged_over_the_scene():
    noisy = [SMALL, SMALL + 0.1, SMALL - 0.1]
    for frame, sign in zip(noisy, (1, -1, 1), strict=True):
        frame[1] = sign * torch.eye(4)[3]  # the middle place turns around
    tokens = video(noisy)
    plan = PruneVid().plan(tokens, 9)
    assert plan.keep.tolist() == [[0, 1, 2, 4, 7]]
    new = merged(plan, tokens.features)[0]
    mean = torch.stack(noisy).mean(dim=0)
    torch.testing.assert_close(new[[0, 2]], mean[[0, 2]])
    torch.testing.assert_close(new[[1, 3, 4]], torch.stack(noisy)[:, 1])


def test_clusters_of_averages_are_averages():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(1, 16, 4, generator=g).expand(2, 16, 4) + 0.01
    tokens = video(list(x))
    plan = PruneVid().plan(tokens, 32)
    assert plan.counts == (8,)  # sixteen averages, half as many clusters
    assert int(plan.keep.max()) < 16  # in the first frame
    new = merged(plan, tokens.features)[0]
    for slot in range(8):
        members = (plan.assign[0] == slot).nonzero().flatten()
        assert {int(m) % 16 for m in members if m < 16} == {int(m) % 16 for m in members if m > 15}
        torch.testing.assert_close(new[slot], x.flatten(0, 1)[members].mean(dim=0))


def test_clusters_hold_what_is_near_and_weigh_it():
    x = torch.tensor([[0.0], [5.0], [0.1], [5.1], [0.2]])
    owner = clusters(x, 2, 2)
    assert len(owner.unique()) == 2
    assert owner[0] == owner[2] == owner[4]
    assert owner[1] == owner[3]
    assert clusters(x, 5, 7).tolist() == [0, 1, 2, 3, 4]
    assert mean_weights(torch.tensor([0, 0, 2])).tolist() == [0.5, 0.5, 1.0]


def test_a_still_video_keeps_fewer_than_its_budget_and_others_all_of_it():
    still = [SMALL] * 4
    moving = list(torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(0)))
    plan = PruneVid(num_tokens=6, attended=1.0).plan(video(still, moving), 6)
    assert plan.counts == (3, 6)
    assert plan.keep[0].tolist() == [0, 1, 2]


def attended(tokens, rows):
    """The bucket in the LLM, with these attention rows `[B, H, Q, N]`."""
    return replace(tokens, query_attention=rows, input_embeddings=tokens.features)


def test_the_second_stage_keeps_a_share_of_each_group():
    still, moving = torch.randn(5, 5, generator=torch.Generator().manual_seed(0)), torch.eye(5)
    tokens = video([still + 3, still + 3, moving, moving.roll(1, 0)])
    method = PruneVid(scenes=0.5)
    first = method.plan(tokens, 20)
    assert first.counts == (15,)  # five averages, and five a frame
    # the last token of each group is attended by one word in one head
    rows = torch.full((1, 2, 3, 15), 0.01)
    for i, place in enumerate((4, 9, 14)):
        rows[0, i % 2, i, place] = 0.5
    rows[..., 6] = 0.2  # by all, but by none as much
    left = replace(
        tokens,
        features=tokens.features[:, first.keep[0]],
        index=first.keep,
        query_attention=rows,
        input_embeddings=tokens.features,
    )
    assert method.plan(left, 20).keep.tolist() == [[0, 4, 6, 9, 10, 14]]
    budgeted = replace(method, keep_ratio=0.5)
    assert budgeted.plan(left, 3).keep.tolist() == [[4, 9, 14]]


def test_shares_of_groups_are_rounded_down():
    score = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.7, 0.3, 0.4, 0.5, 0.0])
    group = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1, -1])
    # nothing of two, two of six, and the newline
    assert top_of_groups(score, group, 0.4, 9).tolist() == [3, 4, 8]
    assert top_of_groups(score, group, 0.4, 2).tolist() == [3, 4]
    assert top_of_groups(score, group, 0.4, 1).tolist() == [3]
    assert top_of_groups(score, group, 0.1, 9).tolist() == [1, 8]  # the best, where none would stay
    assert top_of_groups(score, group, 1.0, 9).tolist() == list(range(9))


def test_without_words_the_earlier_tokens_of_groups_stay():
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    left = attended(video(list(x)), torch.zeros(1, 2, 0, 10))
    assert PruneVid().plan(left, 10).keep.tolist() == [[0, 1, 5, 6]]


def test_newlines_stay_in_both_stages():
    segment = torch.tensor([0, 0, 0, 1, 1, 1, -1])
    layout = CropLayout(segment=segment, row=segment.clamp(max=0), col=segment.clamp(max=0))
    tokens = make_tokens(crops=layout)
    plan = PruneVid(num_tokens=4).plan(replace(tokens, query_attention=None), 4)
    assert plan.keep[:, -1].tolist() == [6, 6]
    new = merged(plan, tokens.features)
    assert torch.equal(new[:, -1], tokens.features[:, -1])
    assert PruneVid(num_tokens=4).plan(tokens, 3).keep[:, -1].tolist() == [6, 6]


def test_two_placements_and_their_budgets():
    first, second = PruneVid().placements(32)
    assert (first.stage, first.layer, first.adaptive) == (Stage.PRE_LLM, 0, True)
    assert (second.layer, second.queries, second.adaptive) == (11, Queries.TEXT_AFTER, True)
    assert second.attention_of == "previous"
    first, second = PruneVid(keep_ratio=0.2).placements(32)
    assert not first.adaptive
    ratios = first.budget.keep_ratio, second.budget.keep_ratio
    assert ratios[1] == pytest.approx(0.4 * ratios[0])
    counts = [p.budget.resolve(1000) for p in PruneVid(num_tokens=20).placements(32)]
    assert counts == [50, 20]


@pytest.mark.refusal
def test_what_cannot_be_done_is_refused():
    tokens = replace(make_tokens(2, grid=(3, 2, 2)), query_attention=None)
    left = take(tokens, torch.tensor([[0, 1, 2, 5], [0, 4, 5, 6]]))
    with pytest.raises(UnsupportedMethodError, match="put it first"):
        PruneVid().plan(left, 2)
    for bad in ({"attended": 0.0}, {"scenes": 1.5}, {"layer": 0}, {"threshold": -2.0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            PruneVid(**bad)
