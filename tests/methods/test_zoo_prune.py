"""ZOO-Prune: sensitivity and selection, by hand."""

from dataclasses import replace

import pytest
import torch
from tests.methods.helpers import anyres, make_tokens
from tests.methods.test_divprune import GOLDEN

from vispress.errors import ConfigError
from vispress.methods import ZOOPrune
from vispress.methods.diversity import maxmin_select, unit
from vispress.methods.zoo_prune import perturbation_scores, sads_select


def test_worked_example():
    # cosines to token 0 are 1 - (0, .05, .8, .9)
    cosine = torch.tensor([1.0, 0.95, 0.2, 0.1])
    x = torch.stack([cosine, (1 - cosine**2).sqrt()], dim=1)[None]
    weight = torch.tensor([[1.0, 0.9, 0.3, 0.0]])
    assert maxmin_select(x, 2, weight.argmax(dim=1), weight).tolist() == [[0, 2]]


def test_golden_vector():
    weight = torch.tensor([[0.2, 1, 0.3, 0.9, 0.5, 0.8, 0, 0.6]])
    (order,) = sads_select(GOLDEN[None], weight, 4)
    assert sorted(order.tolist()) == [1, 3, 4, 5]
    assert order[0] == 1


def test_the_least_sensitive_token_comes_last():
    weight = torch.tensor([[0.2, 1, 0.3, 0.9, 0.5, 0.8, 0, 0.6]])
    assert sads_select(GOLDEN[None], weight, 8)[0, -1] == 6


def test_sensitivity_of_a_linear_projector_is_constant():
    g = torch.Generator().manual_seed(0)
    matrix, x = (torch.randn(*s, generator=g, dtype=torch.float64) for s in [(6, 8), (1, 20, 6)])
    directions = torch.randn(16, 6, generator=g)
    score = perturbation_scores(x, lambda v: v @ matrix + 1, directions, 0.01)
    units = torch.nn.functional.normalize(directions, dim=1).double()
    torch.testing.assert_close(score, (units @ matrix).norm(dim=1).mean().expand(1, 20))
    # then every token weighs 1: max-min from the first token
    features = x @ matrix
    plain = maxmin_select(unit(features), 7, torch.tensor([0]))
    assert torch.equal(sads_select(features, score, 7), plain)


def test_the_projector_sees_at_least_fp32():
    tokens = make_tokens(1, 6, dtype=torch.float16)
    seen = []

    def spy(x):
        seen.append(x.dtype)
        return tokens.projector(x)

    ZOOPrune(m=3).plan(replace(tokens, projector=spy), 2)
    assert seen == [torch.float32] * 6


def test_the_seed_decides_the_directions():
    tokens = make_tokens(1, 200)
    keeps = [ZOOPrune(m=1, seed=s).plan(tokens, 40).keep.tolist() for s in (0, 0, 1)]
    assert keeps[0] == keeps[1] != keeps[2]


def test_sub_images_are_selected_on_their_own():
    crops = anyres(side=4, rows=1, cols=2, newlines=True)
    tokens = make_tokens(2, crops=crops)
    keep = ZOOPrune(m=4).plan(tokens, 4 + 15).keep
    score = perturbation_scores(
        tokens.vision_features,
        tokens.projector,
        torch.randn(4, 6, generator=torch.Generator().manual_seed(0)),
        0.01,
    )
    expected = [torch.where(crops.segment == -1)[0].expand(2, -1)]
    for s in range(3):
        places = torch.where(crops.segment == s)[0]
        expected.append(places[sads_select(tokens.features[:, places], score[:, places], 5)])
    assert torch.equal(keep, torch.cat(expected, dim=1).sort(dim=1).values)


def test_published_counts_are_truncated():
    counts = [
        ZOOPrune(keep_ratio=r).placements(32)[0].budget.resolve(576)
        for r in (0.1112, 0.2223, 0.3334)
    ]
    assert counts == [64, 128, 192]


@pytest.mark.refusal
@pytest.mark.parametrize(
    "bad", [{"m": 0}, {"m": 2.5}, {"h": 0}, {"h": -0.1}, {"seed": -1}], ids=str
)
def test_bad_hyper_parameters_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        ZOOPrune(**bad)
