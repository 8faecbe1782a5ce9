"""MMTok: coverage of words and tokens, by hand."""

from dataclasses import replace

import pytest
import torch
from tests.methods.helpers import anyres, make_tokens, only

from vispress.errors import ConfigError
from vispress.methods import MMTok
from vispress.methods._parts.scoring import coverage
from vispress.methods.mmtok import Spread

EYE = torch.eye(2)[None]


def shown(x, words, **more):
    return only(
        features=x, vision_features=x, text_embeddings=words, text_after=words.shape[1], **more
    )


def kept(tokens, num_keep, **options):
    return MMTok(**options).plan(tokens, num_keep).keep[0].tolist()


def test_worked_example():
    word = torch.tensor([[[1.0, 0]]])
    text, image = Spread(word, EYE, 0.02, 1.0), Spread(EYE, EYE, 0.2, 0.25)
    given = [s.given(slice(None), None, s.totals()) for s in (text, image)]
    torch.testing.assert_close(given[0][0, :, 0], torch.tensor([1.0, 2e-22]), atol=1e-6, rtol=0)
    rows = torch.tensor([[0.9933, 0.0067], [0.0067, 0.9933]]) / 4
    torch.testing.assert_close(given[1][0], rows, atol=1e-4, rtol=0)
    # gains 1.25 and .25
    torch.testing.assert_close(
        torch.cat(given, dim=2).sum(dim=2), torch.tensor([[1.25, 0.25]]), atol=1e-4, rtol=0
    )
    assert kept(shown(EYE, word), 1) == [0]
    assert kept(shown(EYE, word.flip(2)), 1) == [1]


def test_without_words_the_picture_decides():
    # two alike and one apart: of the two that are kept one is that
    x = torch.tensor([[[1.0, 0], [1, 0.05], [0, 1]]])
    (first, second) = kept(shown(x, torch.zeros(1, 0, 2)), 2)
    assert first < second == 2


def test_words_alone_where_the_picture_weighs_nothing():
    x = torch.nn.functional.normalize(torch.randn(1, 20, 6), dim=-1)
    assert kept(shown(x, x[:, [3, 11, 17]]), 3, alpha=0.0) == [3, 11, 17]


def test_padding_is_taken_last_and_only_if_it_is_all():
    x = torch.nn.functional.normalize(torch.randn(1, 6, 4), dim=-1)
    padding = torch.tensor([[1.0, 0.9, 1, 0, 1, 0]])
    tokens = shown(x, x[:, :1], padding=padding)
    assert kept(tokens, 3) == [1, 3, 5]
    assert {1, 3, 5} < set(kept(tokens, 4))
    assert len(set(kept(tokens, 5))) == 5
    assert kept(replace(tokens, padding=None), 1) == [0]


def test_each_crop_covers_the_words_on_its_own():
    crops = anyres(side=4, rows=2, cols=1)
    tokens = replace(make_tokens(2, crops=crops), padding=None)
    keep = MMTok().plan(tokens, 8 + 3 * 4).keep
    own = torch.where(crops.segment == 2)[0]
    alone = only(
        features=tokens.features[:, own],
        vision_features=tokens.vision_features[:, own],
        text_embeddings=tokens.text_embeddings,
        text_after=tokens.text_after,
    )
    for b, row in enumerate(own[MMTok().plan(alone, 4).keep]):
        assert row.tolist() == keep[b][torch.isin(keep[b], own)].tolist()


def test_bounds_choose_as_all_gains_do(monkeypatch):
    tokens = make_tokens(2, grid=(1, 5, 8))
    keep = MMTok().plan(tokens, 15).keep
    monkeypatch.setattr(coverage, "fits", lambda N, D: False)
    monkeypatch.setattr(coverage, "AT_A_TIME", 7)
    assert torch.equal(MMTok().plan(tokens, 15).keep, keep)


@pytest.mark.refusal
def test_bad_hyper_parameters_are_refused():
    for bad in ({"alpha": -1.0}, {"text_temperature": 0.0}, {"image_temperature": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            MMTok(**bad)
