"""DART: pivots and what they take, by hand."""

from dataclasses import replace

import pytest
import torch
from tests.methods.helpers import make_tokens, only

from vispress.errors import ConfigError
from vispress.methods import DART
from vispress.types import Queries, Stage

X = torch.tensor([[[1.0, 0], [0.9, 0.1], [-1, 0.2], [0, -1], [0.1, 1], [0.2, -0.9]]])


def bucket(image_norms, text_norms, text_states):
    return only(
        features=X,
        key_norms=torch.tensor([[*image_norms, *text_norms]]),
        text_states=torch.tensor([text_states]),
        final_norm=lambda x: x,
    )


def test_each_pivot_takes_what_is_least_like_it():
    tokens = bucket([9.0, 1, 1, 1, 1, 1], [1.0, 2], [[1.0, 0], [0, 1]])
    method = DART(image_pivots=1, text_pivots=1)
    # pivot 0 takes 2 (cosine -.98); the second word (0, 1) takes 3 (-1)
    assert method.plan(tokens, 3).keep.tolist() == [[0, 2, 3]]
    # one more for the pivot that comes first: after 2 that is 3 (0), the word takes 5
    assert method.plan(tokens, 4).keep.tolist() == [[0, 2, 3, 5]]


def test_the_norm_comes_before_the_cosine():
    tokens = bucket([9.0, 1, 1, 1, 1, 1], [], [[0.0, 0]])
    tokens = replace(tokens, text_states=torch.zeros(1, 0, 2))
    flat = replace(
        tokens, final_norm=lambda x: x * torch.tensor([0.0, 1]) + torch.tensor([0.01, 0])
    )
    method = DART(image_pivots=1)
    assert method.plan(tokens, 2).keep.tolist() == [[0, 2]]
    # the first channel is gone: cosines .09, .04, .01 of 1, 2, 4 and of 3 and 5
    assert method.plan(flat, 2).keep.tolist() == [[0, 3]]


def test_a_budget_below_the_pivots_keeps_the_largest_keys():
    tokens = bucket([1.0, 5, 3, 4, 2, 0], [1.0], [[1.0, 0]])
    assert DART().plan(tokens, 3).keep.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(("num_keep", "share"), [(188, 23), (124, 15), (60, 7)])
def test_published_counts_are_equal_shares(num_keep, share):
    assert num_keep == 4 + 8 * share
    tokens = make_tokens(1, 576, queries=6)
    (keep,) = DART().plan(tokens, num_keep).keep
    assert len(keep.unique()) == num_keep
    assert torch.isin(tokens.key_norms[0, :576].topk(4).indices, keep).all()


def test_prunes_once_before_the_layer():
    (placement,) = DART(keep_ratio=0.25).placements(32)
    assert (placement.stage, placement.layer) == (Stage.IN_LLM, 2)
    assert (placement.queries, placement.attention_of) == (Queries.TEXT_AFTER, "previous")


@pytest.mark.refusal
def test_bad_hyper_parameters_are_refused():
    for bad in ({"layer": 0}, {"image_pivots": 0}, {"text_pivots": -1}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            DART(**bad)
