"""DyCoke: which frames are compared with which, and counts, by hand."""

import pytest
import torch
from tests.methods.helpers import make_tokens, only, take

from vispress.errors import ConfigError, UnsupportedMethodError
from vispress.methods import DyCoke
from vispress.methods.frame_windows import frame_shares, references
from vispress.types import CropLayout


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
    with pytest.raises(UnsupportedMethodError, match=r"dynamic=True .* at prefill only; leave"):
        DyCoke(dynamic=True)
    with pytest.raises(ConfigError, match="pruned"):
        DyCoke(pruned=1.5)
    tokens = make_tokens(2, grid=(3, 2, 2))
    left = take(tokens, torch.tensor([[0, 1, 2, 5], [0, 4, 5, 6]]))
    with pytest.raises(UnsupportedMethodError, match="put it first"):
        DyCoke().plan(left, 2)
