"""SCOPE: coverage times saliency, by hand."""

import pytest
import torch
from tests.methods.helpers import anyres, make_tokens, only

from vispress.errors import ConfigError
from vispress.methods import SCOPE
from vispress.methods._parts.scoring import coverage
from vispress.methods.scope import cover

THREE = torch.tensor([[[1.0, 0], [0.8, 0.6], [0, 1]]])


def test_worked_example():
    # gains 1.8, 2.4, 1.6, times attention .9, .48, .48; then .8 * .2 and 1 * .3
    saliency = torch.tensor([[0.5, 0.2, 0.3]])
    assert cover(THREE, saliency, 1.0, 3).tolist() == [[0, 2, 1]]
    assert cover(THREE, saliency, 0.0, 1).tolist() == [[1]]
    tokens = only(vision_features=THREE, cls_attention=saliency[:, None])
    assert SCOPE().plan(tokens, 2).keep.tolist() == [[0, 2]]


def test_the_exponent_weighs_attention():
    # squared: .45, .096, .144 (times 1.8, 2.4, 1.6); of the rest 1 * .09 and .8 * .04
    saliency = torch.tensor([[0.2, 0.5, 0.3]])
    # .36, 1.2, .48 -> 1; then gains of 0: .2 + 0 = .2 and of 2: .4
    assert cover(THREE, saliency, 1.0, 2).tolist() == [[1, 2]]
    assert cover(THREE, torch.tensor([[0.9, 0.1, 0.1]]), 2.0, 1).tolist() == [[0]]


def test_dissimilar_tokens_count_for_nothing():
    # from 0, not from -1: 2 covers 2 alone and loses nothing by pointing away from 0 and 1
    x = torch.tensor([[[1.0, 0], [1.0, 0.1], [-1.0, 0]]])
    assert cover(x, torch.tensor([[0.3, 0.3, 0.4]]), 1.0, 2).tolist() == [[0, 2]]


def test_copies_come_last():
    x = torch.eye(4).repeat(1, 3, 1)
    order = cover(x, torch.rand(1, 12, generator=torch.Generator().manual_seed(0)), 1.0, 4)
    assert sorted((order[0] % 4).tolist()) == [0, 1, 2, 3]


def test_bounds_choose_as_all_gains_do(monkeypatch):
    tokens = make_tokens(2, 40)
    x, saliency = tokens.vision_features, tokens.cls_attention.mean(dim=1)
    order = cover(x, saliency, 1.0, 25)
    monkeypatch.setattr(coverage, "fits", lambda N, D: False)
    monkeypatch.setattr(coverage, "AT_A_TIME", 7)
    assert torch.equal(cover(x, saliency, 1.0, 25), order)


def test_each_crop_is_covered_on_its_own():
    crops = anyres(side=4, rows=2, cols=1)
    tokens = make_tokens(1, crops=crops)
    keep = SCOPE().plan(tokens, 8 + 3 * 5).keep[0]
    for segment in range(3):
        own = torch.where(crops.segment == segment)[0]
        alone = only(
            vision_features=tokens.vision_features[:, own],
            cls_attention=tokens.cls_attention[..., own],
        )
        assert own[SCOPE().plan(alone, 5).keep[0]].tolist() == keep[torch.isin(keep, own)].tolist()


@pytest.mark.refusal
def test_bad_hyper_parameters_are_refused():
    for bad in ({"alpha": -1.0}, {"scores": "max"}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            SCOPE(**bad)
