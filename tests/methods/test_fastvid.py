"""FastVID: scenes, anchors and their centres, by hand."""

import pytest
import torch
from tests.methods.helpers import make_tokens, only
from torch.utils._python_dispatch import TorchDispatchMode

from vispress.methods import FastVID
from vispress.methods._parts.video.frames import Frames
from vispress.methods._parts.video.scenes import dynamic_scenes
from vispress.methods.fastvid import anchor_frames, centres, fold_into, published_shares
from vispress.types import CropLayout

EIGHT = torch.tensor(
    [
        [1, 0, 0], [0.9, 0.1, 0], [0, 1, 0], [0, 0.9, 0.2],
        [0, 0, 1], [0.6, 0.5, 0.4], [-0.2, 0.1, 0.9], [0.7, -0.1, 0.1],
    ]
)  # fmt: skip


def test_golden_scenes():
    cosine = (0.95, 0.8, 0.97, 0.92, 0.99)
    assert dynamic_scenes(cosine, 3, 0.9) == [(0, 2), (2, 4), (4, 6)]
    # the two rules add up; equal cosines cut the earlier
    assert dynamic_scenes(cosine, 1, 0.9) == [(0, 2), (2, 6)]
    assert dynamic_scenes((0.5, 0.5, 0.5), 2, 0.0) == [(0, 1), (1, 4)]
    assert dynamic_scenes((1.0, 1.0), 8, 0.9) == [(0, 1), (1, 2), (2, 3)]
    assert dynamic_scenes((), 8, 0.9) == [(0, 1)]


@pytest.mark.parametrize(
    ("length", "frames", "each"),
    [
        (1, [0], 7), (2, [1], 14), (4, [3], 28), (5, [4, 0], 17), (6, [5, 1], 21),
        (9, [8, 4, 0], 21),
    ],
)  # fmt: skip
def test_golden_anchors(length, frames, each):
    found = anchor_frames(length, 7 * length, 184, 4)
    assert [frame for frame, _ in found] == frames
    # what does not divide is lost in the code, and the last frame's here
    assert [share for _, share in found][1:] == [each] * (len(frames) - 1)
    assert sum(share for _, share in found) == 7 * length


def test_published_counts_of_both_variants():
    """The worked example of the vectors: eight of a frame, three of them merged."""
    seven = [(0, 7)]
    (one,) = published_shares(seven, 40, 8, 0.4, 4, "onevision")
    assert one == ([5] * 7, [(6, 10), (2, 10)])  # 21 do not divide: one is lost
    (other,) = published_shares(seven, 40, 8, 0.4, 4, "video")
    assert other == ([5, 5, 5, 5, 5, 5, 4], [(6, 11), (2, 11)])
    # remainders: to earlier frames, and to later anchors
    (other,) = published_shares([(0, 5)], 40, 7, 0.4, 2, "video")
    assert other == ([5, 4, 4, 4, 4], [(4, 5), (2, 5), (0, 4)])
    # an anchor holds no more than what does not stand out
    (full,) = published_shares([(0, 8)], 10, 8, 0.5, 8, "video")
    assert full == ([4] * 8, [(7, 6)])


def test_without_a_budget_counts_are_the_codes():
    tokens = make_tokens(2, grid=(5, 4, 5))
    plan = FastVID(retained=0.4, scenes=1, threshold=-1.0, anchor_step=3).plan(tokens, 100)
    # eight of twenty: five of each frame, and fifteen in two anchors, of which one is lost
    assert plan.counts == (39, 39)
    plan = FastVID(retained=0.4, scenes=1, threshold=-1.0, anchor_step=3, variant="video").plan(
        tokens, 100
    )
    assert plan.counts == (40, 40)
    assert FastVID(retained=0.0).plan(tokens, 100).counts == (5, 5)


def test_an_anchors_own_centres_are_no_members_of_the_other_variant():
    """One frame, nothing stands out: its two centres hold the two others."""
    x = torch.tensor([[[4.0, 0], [0, 4], [1, 0.1], [0.1, 1]]])
    attention, scene = torch.zeros(1, 4), [(0, 1)]
    found = {}
    for variant in ("onevision", "video"):
        method = FastVID(context=1.0, variant=variant, alpha=0.0)
        values, kept = method.fold(x, attention, scene, 2)
        found[variant] = values[0, kept.sort().values]
    keep = kept.sort().values
    members = [place for place in range(4) if place not in keep.tolist()]
    flat = x[0]
    by = [keep[int((torch.nn.functional.cosine_similarity(flat[m], flat[keep])).argmax())]
          for m in members]  # fmt: skip
    assert sorted(int(place) for place in by) == keep.tolist()
    for slot, place in enumerate(keep.tolist()):
        member = flat[members[[int(b) for b in by].index(place)]]
        torch.testing.assert_close(found["video"][slot], (flat[place] + member) / 2)
        both = flat[place] / 3 + 2 / 3 * (flat[place] + member) / 2
        torch.testing.assert_close(found["onevision"][slot], both)


def test_newlines_of_rows_that_keep_a_token_stay():
    # two frames of two rows of two, a newline behind each row
    places = torch.tensor([[0, 1, 3, 4], [6, 7, 9, 10]])
    video = Frames(places, torch.tensor([2, 5, 8, 11]))
    assert video.with_row_newlines(torch.tensor([7, 0])).tolist() == [0, 2, 10, 11]
    assert video.with_row_newlines(torch.tensor([2, 3])).tolist() == [3, 4, 5]


def test_anchors_stand_closer_where_they_cannot_hold_their_share():
    assert anchor_frames(8, 40, 10, 4) == [(7, 10), (5, 10), (3, 10), (1, 10)]
    assert anchor_frames(3, 30, 10, 4) == [(2, 10), (1, 10), (0, 10)]
    assert anchor_frames(4, 0, 10, 4) == []


def test_centres_are_density_peaks():
    # with two equal tokens the later one is no peak: it is at distance 0 from the denser one
    x = torch.cat([EIGHT, EIGHT[4:5]])
    assert 8 not in centres(x, 5).tolist()
    # the middle of the crowd; the loner is far, and has no density
    assert centres(torch.tensor([[0.0], [0.1], [0.2], [5.0], [0.1]]), 1).tolist() == [1]


def test_a_centre_keeps_six_tenths_of_itself():
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.3], [0.0, 1.0], [0.0, 1.0]])
    peaks, members = torch.tensor([0, 3, 4]), torch.tensor([0, 1, 2, 3, 4])
    # three go to the first, of equal peaks the first gets both, the last gets none
    new = fold_into(x, peaks, members, 0.6)
    torch.testing.assert_close(new, torch.tensor([[1.4, 0.04], [0.0, 1.0], [0.0, 1.0]]))
    # alone, or with a small alpha, it keeps 1 / (n + 1)
    new = fold_into(x, peaks, members, 0.1)
    torch.testing.assert_close(new[0], torch.tensor([0.25 + 0.75 * 2, 0.75 * 0.1]))


def test_published_counts_of_a_scene():
    method = FastVID(keep_ratio=0.1)
    x = torch.randn(6, 196, 5, generator=torch.Generator().manual_seed(0))
    attention = torch.rand(6, 196, generator=torch.Generator().manual_seed(1))
    _, kept = method.fold(x, attention, [(0, 1), (1, 6)], 6 * 19)
    counts = (kept // 196).bincount(minlength=6).tolist()
    # a scene of one frame: 12 + 7; of five: 12 each, and 35 in two anchors
    assert counts == [19, 12 + 17, 12, 12, 12, 12 + 18]
    top = attention.topk(12, dim=1).indices + 196 * torch.arange(6)[:, None]
    assert set(top.flatten().tolist()) <= set(kept.tolist())


def test_salient_tokens_keep_their_values_and_centres_hold_the_scene():
    g = torch.Generator().manual_seed(0)
    x, attention = torch.randn(3, 8, 4, generator=g), torch.rand(3, 8, generator=g)
    method = FastVID(context=0.5)
    values, kept = method.fold(x, attention, [(0, 3)], 3 * 4)
    standing = (attention.topk(2, dim=1).indices + 8 * torch.arange(3)[:, None]).flatten()
    peaks = sorted(set(kept.tolist()) - set(standing.tolist()))
    assert [place // 8 for place in peaks] == [2] * 6
    same = sorted(set(range(24)) - set(peaks))
    assert torch.equal(values.flatten(0, 1)[same], x.flatten(0, 1)[same])
    # by hand: members are the eighteen others
    flat, members = x.flatten(0, 1), sorted(set(range(24)) - set(standing.tolist()))
    unit = torch.nn.functional.normalize(flat, dim=1)
    owner = (unit[members] @ unit[peaks].T).argmax(dim=1)
    for slot, place in enumerate(peaks):
        own = flat[[m for m, o in zip(members, owner.tolist(), strict=True) if o == slot]]
        w = max(1 / (len(own) + 1), 0.6)
        new = w * flat[place] + (1 - w) * own.mean(dim=0)
        torch.testing.assert_close(values.flatten(0, 1)[place], new)


def test_values_are_put_in_once_however_many_anchors_there_are():
    copies = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            copies.extend([func] * (func is torch.ops.aten.index_copy.default))
            return func(*args, **(kwargs or {}))

    x, scenes = torch.randn(40, 4, 3), [(i, i + 1) for i in range(40)]
    with Count():
        FastVID(context=1.0).fold(x, torch.rand(40, 4), scenes, 80)
    assert len(copies) == 1


def test_videos_of_a_bucket_are_cut_on_their_own():
    x = make_tokens(1, grid=(4, 2, 3)).features.view(1, 4, 6, 8)
    still = x[:, :1].expand(-1, 4, -1, -1)
    features = torch.cat([x, still]).flatten(1, 2)
    tokens = only(features=features, column_attention=torch.rand(2, 2, 24), grid=(4, 2, 3))
    plan = FastVID(scenes=1, context=1.0).plan(tokens, 4)
    # four scenes of a frame each; one scene, whose anchor holds all
    assert (plan.keep // 6).tolist() == [[0, 1, 2, 3], [3, 3, 3, 3]]


def test_the_newline_is_kept_where_there_is_room():
    segment = torch.tensor([0, 0, 0, 1, 1, 1, -1])
    layout = CropLayout(segment=segment, row=segment.clamp(max=0), col=segment.clamp(max=0))
    tokens = make_tokens(crops=layout)
    plan = FastVID().plan(tokens, 4)
    assert plan.keep[:, -1].tolist() == [6, 6]
    assert torch.equal(plan.features[:, -1], tokens.features[:, -1])
    assert FastVID().plan(tokens, 2).keep.max() < 6
