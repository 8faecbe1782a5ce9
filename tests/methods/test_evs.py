"""EVS: change from frame to frame, by hand."""

import pytest
import torch
from tests.methods.helpers import make_tokens, only, take

from vispress.errors import UnsupportedMethodError
from vispress.methods import EVS
from vispress.methods.evs import dissimilarity
from vispress.types import CropLayout

FRAMES = torch.tensor(
    [
        [[1, 0], [0, 1], [1, 1]],
        [[1, 0.1], [1, 0], [1, 1]],
        [[1, 0.1], [1, 0.2], [-1, 1]],
    ]
).flatten(0, 1)[None]


def budget(ratio, size):
    (placement,) = EVS(keep_ratio=ratio).placements(32)
    return placement.budget.resolve(size)


def test_golden_vector():
    tokens = only(features=FRAMES, grid=(3, 1, 3))
    # 4 and 8 both turned by a right angle: the earlier one is kept
    assert EVS().plan(tokens, budget(1 - 0.5, 9)).keep.tolist() == [[0, 1, 2, 4]]
    assert EVS().plan(tokens, 3).keep.tolist() == [[0, 1, 2]]


def test_the_first_frame_stands_above_all():
    change = dissimilarity(FRAMES, 3)[0]
    assert change[:3].tolist() == [255.0] * 3
    torch.testing.assert_close(
        change[[3, 4, 5, 8]], torch.tensor([0.00496, 1, 0, 1]), rtol=0, atol=1e-5
    )


def test_published_count():
    assert budget(1 - 0.7, 16 * 169) == 811
    assert budget(1 - 0.9, 100) == 9  # truncated: 1 - 0.9 is below 0.1


def test_the_newline_behind_the_last_frame_is_kept():
    segment = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, -1])
    layout = CropLayout(segment=segment, row=segment.clamp(max=0), col=segment.clamp(max=0))
    features = torch.cat([FRAMES, torch.zeros(1, 1, 2)], dim=1)
    tokens = only(features=features, crops=layout)
    assert EVS().plan(tokens, 5).keep.tolist() == [[0, 1, 2, 4, 9]]


@pytest.mark.refusal
def test_a_video_that_was_pruned_before_is_refused():
    tokens = make_tokens(2, grid=(3, 2, 2))
    left = take(tokens, torch.tensor([[0, 1, 2, 5], [0, 4, 5, 6]]))
    with pytest.raises(UnsupportedMethodError, match="put it first"):
        EVS().plan(left, 2)
