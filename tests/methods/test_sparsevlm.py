"""SparseVLM: raters, counts and recycling, by hand."""

from dataclasses import replace

import pytest
import torch
from tests.methods.helpers import make_tokens, merged, only
from tests.methods.test_divprune import GOLDEN

from vispress.errors import ConfigError
from vispress.methods import SparseVLM
from vispress.methods._parts.clustering.density_peaks import dpc_clusters, dpc_scores
from vispress.methods._parts.scoring.text_raters import relation, text_raters
from vispress.methods.sparsevlm import fold_dropped, kept_of, recycled
from vispress.types import Queries

VISUAL = torch.tensor([[[1.0, 0], [0, 1], [1, 1]]])
WORDS = torch.tensor([[[2.0, 0], [0, 1], [-1, -1], [0.5, 0.5]]])


def worded(**more):
    return only(features=VISUAL, input_embeddings=VISUAL, text_embeddings=WORDS, **more)


def test_golden_vector_of_the_raters():
    assert text_raters(worded(text_after=4)).tolist() == [[True, True, False, False]]
    rating = (VISUAL @ WORDS.mT).softmax(dim=2).mean(dim=1)
    expected = torch.tensor([[0.4849, 0.2599, 0.0366, 0.2186]])
    torch.testing.assert_close(rating, expected, rtol=0, atol=5e-5)


def test_only_words_behind_the_image_rate_and_only_raters_count():
    # of the last three words, (0, 1) and (.5, .5) rate above the mean
    rows = torch.tensor([[[[0.1, 0.2, 0.3], [9, 9, 9], [0.3, 0.2, 0.5]]]])
    score, _, chosen = relation(worded(text_after=3, query_attention=rows))
    assert chosen.tolist() == [[True, False, True]]
    torch.testing.assert_close(score, torch.tensor([[0.2, 0.2, 0.4]]))


def test_golden_vector_of_the_clusters():
    density, distance = dpc_scores(GOLDEN[None], 3)
    expected = torch.tensor([0.9857, 0.9879, 0.9129, 0.9345, 0.8919, 0.9079, 0.8840, 0.9780])
    torch.testing.assert_close(density[0], expected, rtol=0, atol=5e-5)
    expected = torch.tensor([0.0816, 0.8679, 0.1291, 0.7047, 0.5686, 0.3697, 0.1414, 0.1732])
    torch.testing.assert_close(distance[0], expected, rtol=0, atol=5e-5)
    centres, label = dpc_clusters(GOLDEN[None], 3)
    assert centres.tolist() == [[1, 3, 4]]
    assert label.tolist() == [[0, 0, 1, 1, 2, 0, 2, 0]]


def test_blocks_do_not_change_the_clusters_and_equal_tokens_tie(monkeypatch):
    x = make_tokens(2, 50).features
    for ours, whole in zip(dpc_scores(x, 4, block=7), dpc_scores(x, 4), strict=True):
        torch.testing.assert_close(ours, whole)
    whole = dpc_clusters(x, 4)
    with monkeypatch.context() as changed:
        changed.setattr("vispress.methods._parts.clustering.density_peaks.BLOCK", 7)
        assert all(map(torch.equal, dpc_clusters(x, 4), whole))
    centres, label = dpc_clusters(torch.ones(1, 6, 3), 2)
    assert (centres.tolist(), label.tolist()) == ([[0, 1]], [[0, 1, 0, 0, 0, 0]])


@pytest.mark.parametrize(
    ("preset", "counts"),
    [(192, (300, 200, 110)), (128, (303, 110, 36)), (96, (238, 48, 26)), (64, (66, 30, 17))],
)
def test_published_counts(preset, counts):
    n = 576
    for placement, kept in zip(SparseVLM(preset=preset).placements(32), counts, strict=True):
        num_keep = placement.budget.resolve(576)
        assert kept_of(num_keep, n) == kept
        assert num_keep == kept + recycled(n - kept)[1]
        n = num_keep


def test_clusters_are_means_at_their_centres():
    # three stay; of five dropped the best two are recycled, into one cluster
    score = torch.tensor([[0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]])
    assert recycled(5) == (2, 1)
    plan = fold_dropped(GOLDEN[None], score, 3, 1)
    assert plan.keep.tolist() == [[0, 1, 2, 3]]
    assert plan.assign.tolist() == [[0, 1, 2, 3, 3, -1, -1, -1]]
    mean = (GOLDEN[3] + GOLDEN[4]) / 2
    torch.testing.assert_close(merged(plan, GOLDEN[None])[0, 3], mean)


def test_where_and_what_is_read():
    placements = SparseVLM().placements(32)
    assert [p.layer for p in placements] == [3, 7, 16]
    assert {(p.queries, p.attention_of) for p in placements} == {(Queries.TEXT_AFTER, "previous")}


def test_counts_by_rank():
    tokens = make_tokens(2, 40, queries=8)
    method = SparseVLM(rank_scale=3.0, rank_bias=1.0)
    assert all(p.adaptive for p in method.placements(32))
    rows = tokens.query_attention.mean(dim=1)
    chosen = text_raters(tokens)
    ranks = chosen.sum(dim=1).tolist()  # random rows are independent
    assert method.counts(rows, chosen, 40) == [3 * r + 1 for r in ranks]
    kept = [3 * r + 1 + recycled(40 - 3 * r - 1)[1] for r in ranks]
    assert list(method.plan(tokens, 40).counts) == kept
    assert method.counts(rows, chosen, 3) == [3, 3]


def test_a_budget_without_room_for_clusters_has_none():
    assert recycled(85 - 3) == (25, 3)
    assert kept_of(3, 85) == 3
    plan = SparseVLM().plan(make_tokens(1, 85), 3)
    assert (plan.assign >= 0).sum() == 3


def test_without_words_behind_the_image_the_earlier_tokens_stay():
    tokens = make_tokens(1, 20)
    rows = tokens.query_attention[:, :, :0]
    none = replace(tokens, query_attention=rows, rotary_prior=None, text_after=0)
    keep = SparseVLM().plan(none, 7).keep
    assert keep[0, :6].tolist() == list(range(6))


@pytest.mark.refusal
def test_bad_hyper_parameters_are_refused():
    for bad in ({"preset": 100}, {"layers": (3, 2)}, {"rank_scale": -1.0}, {"rank_bias": "x"}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            SparseVLM(**bad)
