"""HiPrune: anchors, neighbours by number and registers, by hand."""

from dataclasses import replace

import pytest
import torch
from tests.methods.helpers import anyres, make_tokens, only

from vispress.errors import ConfigError
from vispress.methods import HiPrune

GRID = (1, 3, 4)


def two_layers(middle, deep, **geometry):
    """Attention `[1, E, H, N]` of the object layer and of the last."""
    rows = torch.stack([torch.as_tensor(middle), torch.as_tensor(deep)]).float()
    return only(column_attention=rows[None, :, None], **geometry)


def peak(*places, count=12):
    """A score that is highest at the first of the places, then at the next."""
    score = torch.zeros(count)
    score[list(places)] = torch.arange(len(places), 0, -1).float()
    return score


def kept(tokens, num_keep, **options):
    return HiPrune(**options).plan(tokens, num_keep).keep[0].tolist()


def test_worked_example():
    # one anchor, 3: 2, 4 (the next row), 7 below and, above the picture, 0; then one register
    assert kept(two_layers(peak(3), peak(9, 10), grid=GRID), 6, alpha=1.0) == [0, 2, 3, 4, 7, 9]


@pytest.mark.parametrize(("num_keep", "anchors"), [(192, 4), (128, 3), (64, 1), (20, 0)])
def test_published_numbers_of_anchors(num_keep, anchors):
    ours = peak(*range(0, 576, 100), count=576)
    tokens = two_layers(ours, -torch.arange(576), grid=(1, 24, 24))
    keep = kept(tokens, num_keep)
    assert len(keep) == num_keep
    # registers are the first tokens; anchors are far from them
    assert [place in keep for place in (200, 300, 400, 500)] == [
        anchors > rank for rank in range(2, 6)
    ]


def test_where_neighbours_do_not_fit_those_of_weak_anchors_go():
    # 5: 4, 6, 1, 9; 11: 10, 7, and itself
    both = two_layers(peak(5, 11), peak(0), grid=GRID)
    assert kept(both, 8, alpha=1.0) == [1, 4, 5, 6, 7, 9, 10, 11]
    # four neighbours and two places
    small = two_layers(peak(5), torch.arange(12).flip(0), grid=GRID)
    assert kept(small, 3, alpha=1.0) == [1, 4, 5]


def test_scores_of_any_size_choose_as_many():
    loud = two_layers(1e6 * peak(3), 1e6 * peak(2, 3, 4), grid=GRID)
    assert kept(loud, 6, alpha=1.0) == [0, 1, 2, 3, 4, 7]


def test_each_crop_has_its_own_anchors_and_neighbours():
    crops = anyres(side=4, rows=2, cols=1)
    segment = crops.segment
    middle = torch.zeros(len(segment))
    own = torch.where(segment == 2)[0]
    middle[own[6]] = 1.0
    tokens = two_layers(middle, torch.zeros(len(segment)), crops=crops)
    keep = torch.tensor(kept(tokens, 8 + 3 * 5, alpha=1.0))
    assert torch.isin(own[[6, 5, 7, 2, 10]], keep).all()
    assert (segment[keep] == 2).sum() == 5


def test_missing_neighbours_are_nobody():
    whole = two_layers(peak(5), torch.zeros(12), grid=GRID)
    index = torch.tensor([[0, 1, 2, 3, 5, 8, 9, 10, 11]])
    left = only(column_attention=whole.column_attention[..., index[0]], grid=GRID)
    left = replace(left, index=index, num_original=12)
    # 4 and 6 are gone: 5, 1 and 9 stay, and the two earliest
    assert index[0, HiPrune(alpha=1.0).plan(left, 5).keep[0]].tolist() == [0, 1, 2, 5, 9]


def test_layers_of_the_encoder():
    assert HiPrune().encoder_layers(24, 22) == (8, 22)
    assert HiPrune().encoder_layers(32, 31) == (15, 31)
    assert HiPrune().encoder_layers(27, 25) == (9, 25)
    assert HiPrune(object_layer=15).encoder_layers(32, 31) == (15, 31)
    assert HiPrune(object_layer=30).encoder_layers(24, 22) == (22,)
    one = make_tokens(1, grid=GRID)
    assert len(kept(one, 5)) == 5


@pytest.mark.refusal
def test_bad_hyper_parameters_are_refused():
    for bad in ({"alpha": 1.5}, {"object_layer": -1}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            HiPrune(**bad)
