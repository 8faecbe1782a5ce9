"""SparseVLM+: prior, heads and counts, by hand."""

from dataclasses import replace

import pytest
import torch
from tests.methods.helpers import make_tokens
from tests.methods.test_sparsevlm import worded

from vispress.errors import ConfigError
from vispress.methods import SparseVLMPlus
from vispress.types import Queries


def seen(rows, prior):
    """Three visual tokens and four words, of which the first two are raters (golden vector)."""
    rows = torch.tensor(rows).expand(1, -1, 4, 3)
    return worded(text_after=4, query_attention=rows, rotary_prior=torch.tensor(prior)[None])


def test_attention_is_divided_by_the_prior_and_only_raters_count():
    prior = [[1.0, 2, 4], [2, 2, 2], [9, 9, 9], [1e-9, 1, 1]]
    tokens = seen([[[[0.4]]]], prior)
    expected = torch.tensor([[0.4 + 0.2, 0.2 + 0.2, 0.1 + 0.2]]) / 2
    torch.testing.assert_close(SparseVLMPlus().score(tokens), expected)
    assert SparseVLMPlus(keep_ratio=0.4).plan(tokens, 1).keep.tolist() == [[0]]


def test_the_divisor_keeps_a_least_size_and_its_sign():
    prior = [[2.0, 1e-9, -1e-9], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
    score = SparseVLMPlus().score(seen([[[[0.4]]]], prior))
    least = 0.4 / 2e-6
    expected = torch.tensor([[0.2 + 0.2, least + 0.2, 0.2 - least]]) / 2
    torch.testing.assert_close(score, expected)


def test_the_heads_with_the_largest_sum_count_and_ties_take_the_earlier():
    one = torch.ones(4, 3)
    rows = [[[[0.1, 0.1, 0.1]], [[0.5, 0.0, 0.4]], [[0.0, 0.9, 0.0]], [[0.0, 0.0, 0.9]]]]
    tokens = seen(rows, one.tolist())
    for heads, expected in [
        (1, [0.5, 0.0, 0.4]),
        (2, [0.25, 0.45, 0.2]),
        (9, [0.15, 0.25, 0.35]),
    ]:
        torch.testing.assert_close(
            SparseVLMPlus(heads=heads).score(tokens), torch.tensor([expected])
        )


@pytest.mark.parametrize(
    ("preset", "counts"),
    [(192, (300, 200, 118)), (128, (238, 108, 60)), (96, (246, 54, 28)), (64, (66, 34, 20))],
)
def test_published_counts(preset, counts):
    placements = SparseVLMPlus(preset=preset).placements(32)
    assert tuple(p.budget.resolve(576) for p in placements) == counts


def test_where_and_what_is_read():
    placements = SparseVLMPlus().placements(32)
    assert [p.layer for p in placements] == [3, 7, 16]
    assert {(p.queries, p.attention_of) for p in placements} == {(Queries.TEXT_AFTER, "previous")}
    assert SparseVLMPlus.default_positions == "original"


def test_without_words_behind_the_image_the_earlier_tokens_stay():
    tokens = make_tokens(1, 20)
    none = replace(
        tokens,
        query_attention=tokens.query_attention[:, :, :0],
        rotary_prior=tokens.rotary_prior[:, :0],
        text_after=0,
    )
    assert SparseVLMPlus().plan(none, 7).keep.tolist() == [list(range(7))]


@pytest.mark.refusal
def test_bad_hyper_parameters_are_refused():
    for bad in ({"preset": 100}, {"layers": (3, 2)}, {"heads": 0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            SparseVLMPlus(**bad)
