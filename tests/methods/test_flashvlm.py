"""FlashVLM: text match, fusion and selection, by hand."""

from dataclasses import replace

import pytest
import torch
from tests.methods.helpers import make_tokens, only

from vispress.errors import ConfigError
from vispress.methods import FlashVLM, VisPruner
from vispress.methods._parts.scoring.question import quantile
from vispress.methods.flashvlm import sharpened, word_match


def test_worked_example_of_the_text_distribution():
    match = torch.cat([torch.tensor([0.06, 0.05, 0.04, 0.03]), torch.full((572,), 0.02)])[None]
    ours = sharpened(match.double())[0]
    # the top 0.5 % of 576 are three tokens; the fourth (.0005) is damped
    expected = torch.tensor([1, 0.082, 0.0067, 0.00005], dtype=torch.float64)
    torch.testing.assert_close(ours[:4], expected, rtol=0.02, atol=1e-5)
    assert ours[4:].unique().tolist() == [1e-6]


@pytest.mark.parametrize("count", [1, 2, 144, 201, 576])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_quantile_is_torch_s(count, dtype):
    score = make_tokens(3, count, dtype=dtype).mean_attention.to(dtype)
    score[1] = float("nan")
    for q in (0.0, 0.31, 0.995, 1.0):
        expected = score.quantile(q, dim=1, keepdim=True)
        assert torch.equal(quantile(score, q).nan_to_num(-1), expected.nan_to_num(-1))


def test_the_word_that_fits_best_decides():
    x = torch.tensor([[[2.0, 0], [1, 1]]])
    words = torch.tensor([[[3.0, 0], [0, 1]]])
    # cosines (1, 0) and (.7071, .7071): softmax of /.05 is 1 and 0 to 2e-9, then halves
    ours = word_match(x, words, gating=False)
    torch.testing.assert_close(ours, torch.tensor([[1.0, 0.70711]]), rtol=0, atol=1e-5)
    # gating: the second word is a third as long; .7071 and .2357
    gated = word_match(x, words, gating=True)
    torch.testing.assert_close(gated, torch.tensor([[1.0, 0.70707]]), rtol=0, atol=5e-5)


def test_fusion_is_a_geometric_mean():
    a, match = torch.tensor([[0.0, 0.5, 1.0]]), torch.tensor([[0.0, 0.02, 0.04]])
    fused = FlashVLM(eta=0.25).fused(a, match)
    expected = a.clamp(min=1e-6) ** 0.75 * sharpened(match) ** 0.25
    torch.testing.assert_close(fused, expected)


def test_without_text_attention_alone_ranks():
    tokens = make_tokens(2, 40)
    empty = replace(tokens, text_embeddings=tokens.text_embeddings[:, :0], text_after=0)
    ours, theirs = FlashVLM().plan(empty, 13), VisPruner().plan(tokens, 13)
    assert torch.equal(ours.keep, theirs.keep)


def test_the_token_that_the_text_names_is_kept():
    g = torch.Generator().manual_seed(0)
    features = torch.randn(1, 30, 8, generator=g)
    tokens = only(
        features=features,
        vision_features=torch.randn(1, 30, 6, generator=g),
        cls_attention=torch.linspace(1, 2, 30)[None, None],
        text_embeddings=features[:, 3:4],
        text_after=1,
    )
    plan = FlashVLM(important_ratio=1.0)
    assert plan.plan(tokens, 1).keep.tolist() == [[3]]
    assert replace(plan, eta=0.0).plan(tokens, 1).keep.tolist() == [[29]]


@pytest.mark.refusal
def test_bad_hyper_parameters_are_refused():
    for bad in ({"eta": 2.0}, {"important_ratio": -0.1}, {"step": 0}, {"gating": 1}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            FlashVLM(**bad)
