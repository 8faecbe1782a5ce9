"""CMAI: the focus of words on image tokens, and the pairs that hold most of it."""

import pytest
import torch

from vispress.errors import ConfigError
from vispress.methods import CMAI


def example():
    # three words behind two image tokens; the first two have seen them
    text = torch.tensor([[[0.5, 0.0, 0.0], [0.4, 0.2, 0.0], [0.1, 0.6, 0.1]]])
    image = torch.tensor([[[0.4, 0.1], [0.0, 0.4], [0.2, 0.0]]])
    return text, image


def test_focus_is_direct_and_through_earlier_words():
    text, image = example()
    # focus: (.20, .05), (.16, .12), (.06, .25)
    assert CMAI(mass=0.79).keep_pairs(text, image).tolist() == [
        [[True, False], [True, True], [False, True]]
    ]
    assert CMAI(mass=0.81).keep_pairs(text, image).tolist() == [
        [[True, True], [True, True], [True, True]]
    ]
    assert CMAI(mass=0.5).keep_pairs(text, image).tolist() == [
        [[True, False], [True, False], [False, True]]
    ]


def test_a_row_is_decided_alone_as_among_others():
    text, image = example()
    whole = CMAI(mass=0.7).keep_pairs(text, image)
    for row in range(3):
        alone = CMAI(mass=0.7).keep_pairs(text[:, row : row + 1], image)
        assert torch.equal(alone, whole[:, row : row + 1])


def test_padding_changes_nothing():
    text, image = (torch.rand(2, 5, n, dtype=torch.float64) for n in (5, 7))
    text = text.tril()
    wide = torch.nn.functional.pad(text, (2, 0, 2, 0))
    tall = torch.nn.functional.pad(image, (0, 3, 2, 0))
    keep = CMAI().keep_pairs(text, image)
    assert torch.equal(CMAI().keep_pairs(wide, tall)[:, 2:, :7], keep)
    assert 0 < int(keep.sum()) < keep.numel()


def test_never_all_of_them_and_a_row_without_focus_keeps_everything():
    text, image = torch.eye(2)[None], torch.tensor([[[0.0, 0.0, 0.0], [0.2, 0.2, 0.2]]])
    assert CMAI(mass=1e-6).keep_pairs(text, image).tolist() == [
        [[True, True, True], [True, False, False]]
    ]
    assert CMAI().keep_pairs(text, image[..., :0]).shape == (1, 2, 0)
    assert CMAI().keep_pairs(text[:, 1:], image[..., :1]).tolist() == [[[True]]]


def test_layers_are_scaled_and_nothing_is_dropped():
    (placement,) = CMAI().placements(32)
    assert (placement.stage, placement.layer) == ("mask", 8)
    assert placement.budget.resolve(576) == 576
    assert CMAI().placements(28)[0].layer == 7
    assert CMAI(layer=3).placements(6)[0].layer == 3
    assert CMAI(mass=1.0).pair_masker() is None
    assert CMAI().pair_masker() == CMAI()


@pytest.mark.refusal
def test_values_out_of_range_are_refused():
    for bad in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="mass must be a number in"):
            CMAI(mass=bad)
    for layer in (0, 6):
        with pytest.raises(ConfigError, match="layer"):
            CMAI(layer=layer).placements(6)
