"""HiRED: budgets of crops and their tokens, by hand."""

import pytest
import torch
from tests.methods.helpers import anyres, make_tokens, only

from vispress.errors import ConfigError
from vispress.methods import FasterVLM, HiRED
from vispress.methods.hired import crop_budgets, regions


def test_worked_example():
    # 4 crops of 4, 10 tokens: 4 of the thumbnail (all), 6 left; 2 marks, in bands 0 and 2
    crops = anyres(side=2, rows=2, cols=2, newlines=False)
    shallow = torch.zeros(20)
    shallow[:4] = torch.tensor([0.4, 0.1, 0.3, 0.2])
    deep = torch.arange(20).float()
    tokens = only(cls_attention=torch.stack([shallow, deep])[None, :, None], crops=crops)
    sizes = torch.tensor([4, 4, 4, 4])
    shares = crop_budgets(shallow[None, :4], torch.arange(4), sizes, 6, 2)
    assert shares.tolist() == [[3, 0, 3, 0]]
    keep = HiRED().plan(tokens, 10).keep[0]
    segment = crops.segment[keep]
    assert [(segment == s).sum().item() for s in range(5)] == [4, 3, 0, 3, 0]
    # the three highest of crop 1
    assert keep[segment == 1].tolist() == torch.where(crops.segment == 1)[0][1:].tolist()


def test_bands_and_cells():
    assert regions(4, 2, 2, "bands").view(4, 4).tolist() == [[i] * 4 for i in range(4)]
    upper, lower = [0, 0, 1, 1], [2, 2, 3, 3]
    assert regions(4, 2, 2, "cells").view(4, 4).tolist() == [upper, upper, lower, lower]
    # three crops do not divide 16 tokens
    assert torch.bincount(regions(4, 1, 3, "bands")).tolist() == [6, 5, 5]


@pytest.mark.parametrize(("marks", "crop"), [("bands", 2), ("cells", 1)])
def test_marks_count_for_a_band_or_for_the_crop(marks, crop):
    # the left half of the thumbnail's second row
    crops = anyres(side=4, rows=2, cols=2)
    attention = torch.zeros(1, 2, 1, len(crops.segment))
    attention[0, 0, 0, [4, 5]] = 1.0
    tokens = only(cls_attention=attention, crops=crops)
    keep = HiRED(alpha=0.875, marks=marks).plan(tokens, 8 + 16).keep[0]
    counts = [int((crops.segment[keep] == s).sum()) for s in range(5)]
    assert counts[0] == 14
    assert counts[crop] == 2


def test_what_truncation_loses_is_kept_in_turn():
    crops = anyres(side=3, rows=1, cols=3, newlines=False)
    attention = torch.zeros(1, 2, 1, 36)
    attention[0, 0, 0, :9] = torch.tensor([3.0, 2, 0, 3, 0, 0, 0, 0, 0])
    tokens = only(cls_attention=attention, crops=crops)
    # 4 of the thumbnail, 5 left; of 4 marks three are in band 0 and one in band 1: 3, 1 and 0
    keep = HiRED().plan(tokens, 9).keep[0]
    counts = [int((crops.segment[keep] == s).sum()) for s in range(4)]
    assert counts == [5, 3, 1, 0]
    assert len(keep) == 9


def test_images_that_are_not_cut_have_the_best_of_the_feature_layer():
    tokens = make_tokens(2, grid=(1, 4, 6), encoder_layers=2)
    deep = only(cls_attention=tokens.cls_attention[:, 1], grid=(1, 4, 6))
    assert torch.equal(HiRED().plan(tokens, 7).keep, FasterVLM().plan(deep, 7).keep)


def test_the_budget_is_exact_with_newlines():
    crops = anyres(side=4, rows=2, cols=1, left=1)
    tokens = make_tokens(2, crops=crops, encoder_layers=2)
    newline = torch.where(crops.segment < 0)[0]
    for count in (9, 17, 30):
        keep = HiRED().plan(tokens, count).keep
        assert keep.shape == (2, count)
        assert all(torch.isin(newline, row).all() for row in keep)


@pytest.mark.refusal
def test_bad_hyper_parameters_are_refused():
    for bad in ({"alpha": 1.5}, {"marks": "rows"}, {"scores": "max"}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            HiRED(**bad)
