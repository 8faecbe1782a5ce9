"""CDPruner: relevance and conditional diversity, by hand."""

from dataclasses import replace

import pytest
import torch
from tests.methods.helpers import anyres, make_tokens, only
from tests.methods.test_divprune import GOLDEN

from vispress.errors import ConfigError
from vispress.methods import CDPruner
from vispress.methods.cdpruner import blended_select, text_relevance
from vispress_kernels.dpp_select import dpp_select


def everything(x):
    return torch.ones(x.shape[:2], dtype=torch.bool)


def kept(tokens, num_keep, **options):
    return CDPruner(**options).plan(tokens, num_keep).keep[0].tolist()


def test_relevance_is_the_mean_cosine_scaled_to_one():
    x = torch.tensor([[[2.0, 0], [0, 3], [-1, 0], [5, 5]]])
    texts = torch.tensor([[[1.0, 0], [0, 4]]])  # cosines (1, 0), (0, 1), (-1, 0), (.7071, .7071)
    means = torch.tensor([0.5, 0.5, -0.5, 0.70711])
    expected = (means + 0.5 + 1e-6) / 1.20711
    ours = text_relevance(x, texts, everything(x), negate=False)
    torch.testing.assert_close(ours[0], expected, rtol=1e-4, atol=1e-5)
    turned = text_relevance(x, texts, everything(x), negate=True)
    torch.testing.assert_close(turned[0], (0.70711 - means + 1e-6) / 1.20711, rtol=1e-4, atol=1e-5)


def test_golden_vector_of_the_selection():
    r = torch.tensor([[0.9, 0.5, 0.8, 0.4, 1, 0.7, 0.6, 0.3]])
    # rank 3: the published fourth pick (6) is rounding noise, ours goes by relevance
    assert dpp_select(GOLDEN[None], r, 4).tolist() == [[4, 0, 2, 5]]


def test_worked_example_of_the_selection():
    cosines = torch.tensor([[1, 0.9, 0.1], [0.9, 1, 0.2], [0.1, 0.2, 1]])
    x = torch.linalg.cholesky(cosines)[None]
    assert dpp_select(x, torch.tensor([[1, 0.95, 0.5]]), 3).tolist() == [[0, 2, 1]]


def test_only_text_behind_the_image_counts_if_there_is_any():
    x = torch.tensor([[[1.0, 0], [0, 1], [0.9, 0.1]]])
    before, behind = [0.0, 1], [1.0, 0]
    both = torch.tensor([[before, behind]])
    assert kept(only(features=x, text_embeddings=both, text_after=1), 1) == [0]
    # where none follows, all text counts
    assert kept(only(features=x, text_embeddings=both[:, :1], text_after=0), 1) == [1]


def test_without_text_every_token_counts_alike():
    tokens = make_tokens(2, 20)
    empty = replace(tokens, text_embeddings=tokens.text_embeddings[:, :0], text_after=0)
    alike = CDPruner(relevance="none").plan(tokens, 6).keep
    assert torch.equal(CDPruner().plan(empty, 6).keep, alike)
    assert torch.equal(alike, dpp_select(tokens.features, torch.ones(2, 20), 6).sort(dim=1).values)


def test_more_tokens_than_the_rank_are_filled_by_relevance():
    # two directions only: the third pick gains nothing, and 3 fits the text better than 1
    x = torch.tensor([[[1.0, 0], [0.6, 0.8], [0, 1], [0.8, 0.6]]])
    tokens = only(features=x, text_embeddings=torch.tensor([[[1.0, 0]]]), text_after=1)
    assert kept(tokens, 3) == [0, 1, 3]


def test_newlines_stay_and_set_no_scale():
    crops = anyres(side=3, rows=2, cols=1)
    tokens = make_tokens(1, crops=crops)
    newline = crops.segment < 0
    loud = tokens.features.clone()
    loud[:, newline] = 50 * tokens.text_embeddings[:, :1]
    plan = CDPruner().plan(tokens, 14)
    assert torch.isin(torch.where(newline)[0], plan.keep[0]).all()
    assert torch.equal(CDPruner().plan(replace(tokens, features=loud), 14).keep, plan.keep)


def test_worked_example_of_the_blend():
    # cosine .5, relevance 1 and 0, w = .5: [[1, .25], [.25, .5]]; a third like the second but apart
    x = torch.linalg.cholesky(torch.tensor([[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1.0]]))[None]
    similarity = torch.tensor([[1.0, 0, 0]])
    # first 1; then .5 - .25^2 = .4375 and .5
    assert blended_select(x, similarity, 0.5, 3).tolist() == [[0, 2, 1]]
    # without relevance all are alike, with it alone the others are nothing
    assert blended_select(x, similarity, 0.0, 3)[0, 0] == 0


def test_openvino_selects_in_halves_each_scaled_alone():
    tokens = make_tokens(2, 21)
    keep = CDPruner(variant="openvino").plan(tokens, 7).keep
    assert ((keep < 10).sum(dim=1) == 3).all()
    mean = tokens.text_embeddings.mean(dim=1)[..., None]
    cosine = (torch.nn.functional.normalize(tokens.features, dim=2) @ mean)[..., 0] / mean.norm(
        dim=1
    )
    for part, count, kept_part in (
        (slice(10), 3, keep[:, :3]),
        (slice(10, 21), 4, keep[:, 3:] - 10),
    ):
        alone = blended_select(tokens.features[:, part], cosine[:, part], 0.5, count)
        assert torch.equal(alone.sort(dim=1).values, kept_part)
    (row,) = CDPruner(variant="openvino").plan(make_tokens(1, 21), 1).keep.tolist()
    assert row[0] >= 10  # the second half has what does not share out


def test_openvino_reads_the_whole_prompt():
    tokens = make_tokens(1, 20)
    fewer = replace(tokens, text_after=1)
    same = [CDPruner(variant="openvino").plan(t, 8).keep for t in (tokens, fewer)]
    assert torch.equal(*same)
    alike = CDPruner(variant="openvino", relevance="none").plan(tokens, 8).keep
    assert not torch.equal(alike, same[0])
    unweighted = CDPruner(variant="openvino", relevance_weight=0.0).plan(tokens, 8).keep
    assert torch.equal(alike, unweighted)


@pytest.mark.refusal
def test_bad_hyper_parameters_are_refused():
    for bad in ({"relevance": "clip"}, {"negate": 1}, {"variant": "ov"}, {"relevance_weight": 0.5}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            CDPruner(**bad)
