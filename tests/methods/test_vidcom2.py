"""VidCom2: distance from means, and frames' shares, by hand."""

import pytest
import torch
from tests.methods.helpers import make_tokens, only, take

from vispress.errors import ConfigError, UnsupportedMethodError
from vispress.methods import VidCom2
from vispress.methods.vidcom2 import frame_ratios, scores, spread, steady_channels
from vispress.types import CropLayout

TWO = torch.tensor([[[[1, 0], [0.9, 0.1], [0, 1]], [[1, 0.2], [0.1, 1], [1, 0]]]])
PUBLISHED = torch.tensor([[-1, -1.01, -1.02, -1.05]])


def close(got, expected, atol=6e-4):
    torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=atol)


def test_golden_scores():
    token, frame = scores(TWO)
    close(token, [[[7.152, 7.830, 4.242], [8.359, 4.661, 7.143]]])
    close(frame, [[-3.2045, -3.3585]], atol=6e-5)


def test_published_ratios_of_frames():
    close(frame_ratios(PUBLISHED, 0.25, 0.01), [[0.353, 0.248, 0.210, 0.189]])
    assert frame_ratios(PUBLISHED, 0.9, 0.01).max() == 1.0


def counts(kept, size, number):
    return [int((kept[0] // size == f).sum()) for f in range(number)]


def test_published_counts_of_frames():
    ratios = frame_ratios(PUBLISHED, 0.25, 0.01)
    score = torch.rand(1, 4, 196, generator=torch.Generator().manual_seed(0))
    assert counts(spread(score, ratios, 196), 196, 4) == [69, 49, 41, 37]


def test_a_sum_that_rounding_misses_is_met():
    score = torch.zeros(1, 3, 4)
    # 1.6 three times is rounded to 2 each; of five, the first two frames have two
    assert counts(spread(score, torch.full((1, 3), 0.4), 5), 4, 3) == [2, 2, 1]
    # what a full frame cannot hold goes to the others
    assert counts(spread(score, torch.tensor([[1.0, 0.3, 0.3]]), 9), 4, 3) == [4, 3, 2]


def test_every_frame_keeps_one_token():
    score = torch.zeros(1, 3, 4)
    ratios = torch.tensor([[1.0, 0.0, 0.0]])
    assert counts(spread(score, ratios, 5), 4, 3) == [3, 1, 1]
    # and where there is none for each, the most distinctive frames do
    assert counts(spread(score, ratios, 1), 4, 3) == [1, 0, 0]


def test_the_lowest_of_each_frame_are_kept():
    # the same frame twice: two of each, the third and the first of the golden vector
    x = torch.cat([TWO[:, :1], TWO[:, :1]], dim=1).flatten(1, 2)
    loud = torch.tensor([9.0, -9.0])[:, None].repeat(3, 2)[None]
    tokens = only(features=torch.cat([x, loud], dim=2), grid=(2, 1, 3))
    assert VidCom2().plan(tokens, 4).keep.tolist() == [[0, 2, 3, 5]]


def test_channels_that_vary_most_play_no_part():
    steady = torch.tensor([0.0, 1.0, 0.0, 0.5])[None, :, None].expand(1, 4, 2)
    loud = torch.tensor([9.0, -9.0, 5.0, 1.0])[None, :, None]
    x = torch.cat([loud, steady[..., :1], -loud, steady[..., 1:]], dim=2).view(1, 2, 2, 4)
    assert torch.equal(steady_channels(x), x[..., [1, 3]])


def test_the_newline_is_kept_where_there_is_room():
    segment = torch.tensor([0, 0, 0, 1, 1, 1, -1])
    layout = CropLayout(segment=segment, row=segment.clamp(max=0), col=segment.clamp(max=0))
    features = torch.cat([TWO.flatten(1, 2), torch.zeros(1, 1, 2)], dim=1)
    tokens = only(features=features, crops=layout)
    assert VidCom2().plan(tokens, 3).keep[0, -1] == 6
    assert VidCom2().plan(tokens, 2).keep[0, -1] < 6


def test_frames_share_what_newlines_leave():
    """Ratios are of the tokens beside newlines: one more would give another frame another count."""
    place = torch.arange(4).repeat_interleave(4)
    segment = torch.cat([place, torch.full((6,), -1)])
    layout = CropLayout(segment=segment, row=segment.clamp(max=0), col=segment.clamp(max=0))
    differs = 0
    for seed in range(8):
        features = torch.rand(1, 22, 6, generator=torch.Generator().manual_seed(seed))
        own = features[:, :16].view(1, 4, 4, 6)
        token, frame = scores(steady_channels(own))
        expected, wrong = (
            spread(token, frame_ratios(frame, count / 16, 0.01), 8) for count in (8, 14)
        )
        kept = VidCom2().plan(only(features=features, crops=layout), 14).keep
        assert kept.tolist() == [[*expected[0].tolist(), *range(16, 22)]]
        differs += not torch.equal(expected, wrong)
    assert differs


def test_a_large_temperature_treats_frames_alike():
    tokens = make_tokens(2, grid=(3, 4, 4))
    kept = VidCom2(temperature=1e6).plan(tokens, 12).keep
    assert [counts(kept[b : b + 1], 16, 3) for b in range(2)] == [[4, 4, 4]] * 2


@pytest.mark.refusal
def test_what_cannot_be_done_is_refused():
    tokens = make_tokens(2, grid=(3, 2, 2))
    left = take(tokens, torch.tensor([[0, 1, 2, 5], [0, 4, 5, 6]]))
    with pytest.raises(UnsupportedMethodError, match=r"vidcom2 needs whole .* put it first"):
        VidCom2().plan(left, 2)
    place = torch.tensor([0, 0, 1])
    uneven = CropLayout(segment=place, row=place, col=place)
    with pytest.raises(UnsupportedMethodError, match=r"one size, got sizes \[2, 1\]"):
        VidCom2().plan(only(features=torch.rand(1, 3, 2), crops=uneven), 2)
    with pytest.raises(ConfigError, match="temperature"):
        VidCom2(temperature=0.0)
