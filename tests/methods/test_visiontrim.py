"""VisionTrim: dominant tokens, targets and what they gather, by hand."""

import pytest
import torch
from tests.methods.helpers import anyres, make_tokens

from vispress.errors import ConfigError
from vispress.methods import VisionTrim
from vispress.methods.visiontrim import chosen, dominance


def test_worked_example_of_the_score():
    score = dominance(torch.tensor([[0.3, 0.1, 0.2]]), torch.tensor([[0.1, 0.4, 0.1]]))
    expected = torch.tensor([[0.5187, 0.6050, 0.3851]])
    torch.testing.assert_close(score, expected, atol=1e-4, rtol=0)


def test_means_are_added_three_times_and_a_lone_target_stays():
    # one channel a word; 0 is dominant, 2 and 4 fit the text best, 1 and 3 go to the first of them
    x = torch.tensor([[[9.0, 9], [1, 0], [5, 0], [3, 0], [0, 6]]])
    metric = torch.tensor([[1.0, 0, 0, 0, 0]])
    first, target, y = chosen(x, metric, lambda z: z, (1, 2))
    assert (first.tolist(), target.tolist()) == ([[0]], [[2, 4]])
    # three times the mean of 1 and 3
    assert y.tolist() == [[[11.0, 0.0], [0.0, 6.0]]]


@pytest.mark.parametrize(("num_keep", "split"), [(64, (48, 16)), (3, (2, 1)), (1, (1, 0))])
def test_published_split(num_keep, split):
    assert VisionTrim().split_budget(num_keep) == split


def test_without_targets_tokens_pass_unchanged():
    tokens = make_tokens(2, 30)
    plan = VisionTrim(complement=0).plan(tokens, 8)
    score = dominance(tokens.cls_attention.mean(dim=1), tokens.patch_attention.mean(dim=1))
    assert torch.equal(plan.keep, score.topk(8).indices.sort(dim=1).values)
    assert torch.equal(plan.features, tokens.features.take_along_dim(plan.keep[..., None], dim=1))


def test_targets_are_projected_anew_at_their_places():
    tokens = make_tokens(1, 20)
    plan = VisionTrim(complement=3).plan(tokens, 9)
    same = (plan.features[0] == tokens.features[0, plan.keep[0]]).all(dim=1)
    assert int((~same).sum()) == 3


def test_crops_are_trimmed_on_their_own_and_newlines_stay():
    crops = anyres(side=4, rows=2, cols=1)
    tokens = make_tokens(2, crops=crops)
    plan = VisionTrim().plan(tokens, 8 + 12)
    for row in range(2):
        segment = crops.segment[plan.keep[row]]
        assert [(segment == s).sum().item() for s in (-1, 0, 1, 2)] == [8, 4, 4, 4]
        newline = segment < 0
        whole = tokens.features[row, plan.keep[row][newline]]
        assert torch.equal(plan.features[row, newline], whole)


@pytest.mark.refusal
def test_bad_hyper_parameters_are_refused():
    for bad in ({"complement": -1}, {"scores": "max"}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            VisionTrim(**bad)
