"""DyCoke: which frames are compared with which, and counts, by hand."""

import pytest
import torch
from tests.methods.helpers import make_tokens, only, take

from vispress.errors import ConfigError, UnsupportedMethodError
from vispress.methods import DyCoke
from vispress.methods.cached_selector import Selection
from vispress.methods.dycoke import frame_shares, references
from vispress.types import CropLayout, Stage


def counts(kept, size, number):
    return [int((kept // size == f).sum()) for f in range(number)]


def test_published_frames_and_count():
    reference, whole = references(32)
    assert [f for f, stays in enumerate(whole) if stays] == [0, 4, 8, 12, 16, 20, 24, 28, 30]
    assert all(reference[f] == f - 1 for f in range(1, 32, 2))
    assert all(reference[f] == f - 2 for f in range(2, 28, 4))
    tokens = only(features=torch.rand(1, 32 * 196, 3), grid=(32, 14, 14))
    (keep,) = DyCoke().plan(tokens, 32 * 196).keep
    assert len(keep) == 3098
    assert set(counts(keep, 196, 32)) == {58, 196}


@pytest.mark.parametrize(
    ("number", "whole"),
    [(1, [0]), (2, [0]), (3, [0, 2]), (4, [0, 2]), (5, [0, 4]), (8, [0, 4, 6]), (9, [0, 4, 8])],
)
def test_short_videos(number, whole):
    reference, stays = references(number)
    assert [f for f, one in enumerate(stays) if one] == whole
    # what is pruned is compared with a whole frame, or the third of its window before it is pruned
    assert all(r < f for f, r in enumerate(reference) if f)
    assert reference[0] == min(1, number - 1)


def turned(angles):
    """Unit tokens at these angles `[F, t]`, a video."""
    angles = torch.tensor(angles)
    x = torch.stack([angles.cos(), angles.sin()], dim=2)
    return only(features=x.flatten(0, 1)[None], grid=(len(angles), 1, angles.shape[1]))


def test_the_least_similar_places_are_kept():
    tokens = turned([[0, 0, 0, 0], [0.1, 0.5, 0, 0.3], [0, 0, 0.4, 0.2], [0.1, 0.2, 0.4, 0.2],
                     [0, 0, 0, 0.0]])  # fmt: skip
    # two of four: frame 1 by change since 0, frame 2 since 0, frame 3 since 2; 0 and 4 stay
    plan = DyCoke(pruned=0.5).plan(tokens, 20)
    assert plan.keep.tolist() == [[0, 1, 2, 3, 5, 7, 10, 11, 12, 13, 16, 17, 18, 19]]


def test_a_budget_is_met_by_the_pruned_frames_then_by_the_whole_ones():
    whole = [True, False, True, False]
    assert frame_shares(whole, 10, 26) == [10, 3, 10, 3]
    assert frame_shares(whole, 10, 27) == [10, 4, 10, 3]
    assert frame_shares(whole, 10, 20) == [10, 0, 10, 0]
    assert frame_shares(whole, 10, 7) == [4, 0, 3, 0]
    tokens = turned([[0, 0, 0.0], [0.1, 0.5, 0], [0.2, 0.1, 0]])
    assert DyCoke(num_tokens=7).plan(tokens, 7).keep.tolist() == [[0, 1, 2, 4, 6, 7, 8]]
    # the first frame by change until the next, the third since the first
    assert DyCoke(num_tokens=2).plan(tokens, 2).keep.tolist() == [[1, 6]]


def test_videos_of_a_bucket_are_pruned_on_their_own():
    tokens = make_tokens(3, grid=(4, 2, 3))
    plan = DyCoke().plan(tokens, 24)
    assert plan.counts == (2 * 6 + 2 * 1,) * 3  # int(0.3 * 6) = 1
    assert not torch.equal(plan.keep[0], plan.keep[1])


def test_the_newline_is_kept_where_there_is_room():
    segment = torch.tensor([0, 0, 0, 1, 1, 1, -1])
    layout = CropLayout(segment=segment, row=segment.clamp(max=0), col=segment.clamp(max=0))
    tokens = make_tokens(crops=layout)
    assert DyCoke().plan(tokens, 7).keep.tolist() == [[0, 1, 2, 6]] * 2
    assert DyCoke(num_tokens=2).plan(tokens, 2).keep.max() < 6


@pytest.mark.refusal
def test_what_cannot_be_done_is_refused():
    with pytest.raises(ConfigError, match=r"decode_layer must be an integer in \[0, 31\), got 31"):
        DyCoke(decode_layer=31).decode_placement(32)
    with pytest.raises(ConfigError, match="pruned"):
        DyCoke(pruned=1.5)
    tokens = make_tokens(2, grid=(3, 2, 2))
    left = take(tokens, torch.tensor([[0, 1, 2, 5], [0, 4, 5, 6]]))
    with pytest.raises(UnsupportedMethodError, match="put it first"):
        DyCoke().plan(left, 2)


def state(attention, keep=(2, 1), begun=True):
    """Two samples; the last place of the second holds no visual token."""
    visual = torch.tensor([[True] * 4, [True, True, True, False]])
    return Selection(
        visual=visual,
        num_keep=torch.tensor(keep),
        attention=torch.tensor(attention),
        selected=torch.tensor([[True, False, False, True], [False, False, True, False]]),
        begun=torch.tensor([begun] * 2),
    )


LAST = [[0.4, 0.1, 0.1, 0.2], [0.1, 0.2, 0.3, 0.0]]


def test_the_published_layer_and_share():
    placement = DyCoke().decode_placement(32)
    assert (placement.stage, placement.layer) == (Stage.DECODE, 3)  # layer 2 is read
    for number in (10, 196, 3098, 99, 7):
        assert placement.budget.resolve(number) == int(number * (1 - 0.7))
    assert [DyCoke().decode_placement(n).layer for n in (2, 4, 28, 80)] == [1, 1, 3, 8]
    assert DyCoke(decode_pruned=1.0).decode_placement(32).budget.resolve(9) == 0
    assert DyCoke(decode_pruned=0.0).decode_placement(32).budget.resolve(9) == 9
    for off in ({"dynamic": False}, {"keep_ratio": 1.0}, {"mean_keep_ratio": 1.0}):
        assert DyCoke(**off).decode_placement(32) is None


def test_the_first_step_chooses_the_most_attended_and_the_earlier_of_equals():
    now = torch.tensor([[0.1, 0.3, 0.1, 0.2], [0.2, 0.2, 0.1, 0.0]])
    fresh = [[False, True, False, True], [True, False, False, False]]
    assert DyCoke().select_cached(now, state(LAST, begun=False)).tolist() == fresh
    # were it a later one, attention that is the same would have kept the choice
    same = torch.tensor(LAST)
    first = DyCoke().select_cached(same, state(LAST, begun=False))
    assert first.tolist() == [[True, False, False, True], [False, False, True, False]]
    equal = torch.full((2, 4), 0.25)
    ties = DyCoke(similarity=1.0).select_cached(equal * torch.tensor([[1], [0]]), state(LAST))
    assert ties.tolist() == [[True, True, False, False], [True, False, False, False]]


def test_each_sample_keeps_or_chooses_by_its_own_cosine():
    now = torch.tensor([[0.1, 0.4, 0.3, 0.1], [0.1, 0.2, 0.35, 0.0]])
    cosine = torch.nn.functional.cosine_similarity(now, torch.tensor(LAST))
    assert cosine[0] < 0.9 <= cosine[1]
    chosen = DyCoke().select_cached(now, state(LAST))
    assert chosen.tolist() == [[False, True, True, False], [False, False, True, False]]
    # from the threshold on the choice stays
    at = DyCoke(similarity=float(cosine[1])).select_cached(now, state(LAST))
    over = DyCoke(similarity=float(cosine[1]) + 1e-5).select_cached(now, state(LAST, keep=(2, 2)))
    assert at[1].tolist() == [False, False, True, False]
    assert over[1].tolist() == [False, True, True, False]


def test_the_code_shows_everything_on_steps_that_stay():
    now = torch.tensor([[0.1, 0.4, 0.3, 0.1], [0.1, 0.2, 0.35, 0.0]])
    chosen = DyCoke(reference_quirks=True).select_cached(now, state(LAST))
    assert chosen.tolist() == [[False, True, True, False], [True, True, True, False]]
