"""GlobalCom2: shares of crops and guided scores, by hand."""

import pytest
import torch
from tests.methods.helpers import anyres, make_tokens

from vispress.errors import ConfigError
from vispress.methods import GlobalCom2
from vispress.methods._parts.geometry.crops import cut_of, guided_score
from vispress.methods.base import top_indices
from vispress.methods.globalcom2 import crop_scales


def test_worked_example_of_the_shares():
    cut = cut_of(anyres(side=2, rows=2, cols=2))
    scales = crop_scales(torch.tensor([[[40.0, 35], [30, 25]]]), cut, 0.25, 10.0)
    expected = torch.tensor([[0.3013, 0.2565, 0.2294, 0.2129]], dtype=torch.float64)
    torch.testing.assert_close(scales, expected, rtol=0, atol=5e-5)
    assert (576 * scales).int().tolist() == [[173, 147, 132, 122]]


def test_golden_vector_of_a_crop():
    # one crop of 2 x 2, as large as the thumbnail: no resizing
    cut = cut_of(anyres(side=2, rows=1, cols=1))
    thumbnail = torch.tensor([[[3.0, 1], [2, 0]]])
    ours = guided_score(torch.tensor([[1.0, 4, 2, 2]]), thumbnail, cut)
    expected = torch.tensor([[1.0018, 1.0673, 0.9345, 0.4]])
    torch.testing.assert_close(ours, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("rows", "cols", "top", "left"), [(2, 2, 0, 0), (1, 3, 1, 0), (3, 1, 0, 1), (2, 3, 2, 0)]
)
@pytest.mark.parametrize("newlines", [False, True])
def test_the_cut_is_read_off_the_layout(rows, cols, top, left, newlines):
    layout = anyres(4, rows, cols, top=top, left=left, newlines=newlines)
    cut = cut_of(layout)
    assert (cut.side, cut.rows, cut.cols) == (4, rows, cols)
    assert (cut.height, cut.width) == (4 * rows - 2 * top, 4 * cols - 2 * left)


def test_the_budget_is_met_and_newlines_stay():
    layout = anyres(side=4, rows=2, cols=2, top=1)
    tokens = make_tokens(2, crops=layout)
    newline = torch.where(layout.segment < 0)[0]
    for num_keep in (7, 20, 41):
        keep = GlobalCom2().plan(tokens, num_keep).keep
        assert keep.shape == (2, num_keep)
        assert torch.isin(newline, keep).all()


def test_a_loud_part_of_the_thumbnail_gives_its_crop_more():
    layout = anyres(side=4, rows=2, cols=2, newlines=False)
    tokens = make_tokens(1, crops=layout)
    tokens.cls_logits[:, :, :16] = 0
    tokens.cls_logits[:, :, [0, 1, 4, 5]] = 50
    keep = GlobalCom2().plan(tokens, 20).keep[0]
    counts = torch.bincount(layout.segment[keep], minlength=5)
    assert counts[1] > counts[2:].max()


def test_an_image_that_was_not_cut_has_the_best_by_score():
    tokens = make_tokens(2, grid=(1, 4, 5))
    expected = top_indices(tokens.cls_logits.mean(dim=1), 6)
    assert torch.equal(GlobalCom2().plan(tokens, 6).keep, expected)
    attention = top_indices(tokens.cls_attention.mean(dim=1), 6)
    assert torch.equal(GlobalCom2(logits=False).plan(tokens, 6).keep, attention)


def test_scores_come_from_the_last_encoder_layer():
    assert GlobalCom2().encoder_layers(24, 22) == (23,)


@pytest.mark.refusal
def test_bad_hyper_parameters_are_refused():
    for bad in ({"temperature": 0.0}, {"logits": 1}, {"scores": "max"}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            GlobalCom2(**bad)
