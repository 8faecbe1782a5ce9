"""VisionSelector by hand: the score's two forms, the mask that sums up, and its gradient."""

import dataclasses
import math

import pytest
import torch
from tests.methods.helpers import only

from vispress.errors import ConfigError
from vispress.methods import VisionSelector
from vispress.methods._parts.scoring.soft_choice import with_sum
from vispress.methods.vision_selector import ImportanceScorer, official_weights


def drawn(width=6):
    module = ImportanceScorer(width)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return module


def test_a_score_is_the_mean_over_keys():
    module, x = drawn(), torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))
    query, key = module.query(x), module.key(x)
    pairs = query @ key.mT / 3**0.5
    assert torch.allclose(module(x), pairs.mean(dim=-1), atol=1e-5)


def test_the_example_of_the_formula():
    """Scores 2, 0, -1 and one of three: t = -1.2442, and the mask sums up to 1."""
    tokens = only(features=torch.zeros(1, 3, 1), module=lambda x: torch.tensor([[2.0, 0.0, -1.0]]))
    tokens = dataclasses.replace(tokens, training=True)
    plan = VisionSelector(num_tokens=1, weight=0.5).plan(tokens, 1)
    assert plan.keep.tolist() == [[0]]
    assert torch.allclose(plan.soft, torch.tensor([[0.680, 0.224, 0.096]]), atol=1e-3)
    assert float(plan.soft.sum()) == pytest.approx(1.0, abs=1e-6)
    assert float(plan.losses["vision_selector"]) == pytest.approx(0.5 * 0.2463, abs=1e-4)
    assert (
        VisionSelector(num_tokens=1).plan(dataclasses.replace(tokens, training=False), 1).soft
        is None
    )


def test_the_mask_is_pulled_to_the_choice_and_not_to_what_it_rounds_to():
    """Counts of 0.4, 0.3, 0.2 and 0.1 sum up to 1: the first is wanted, and none is above 0.5."""
    soft = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    tokens = only(features=torch.zeros(1, 4, 1), module=lambda x: soft.logit())
    plan = VisionSelector(num_tokens=1, weight=1.0).plan(
        dataclasses.replace(tokens, training=True), 1
    )
    assert torch.allclose(plan.soft, soft, atol=1e-5)
    expected = -(math.log(0.4) + math.log(0.7) + math.log(0.8) + math.log(0.9)) / 4
    assert float(plan.losses["vision_selector"]) == pytest.approx(expected, abs=1e-5)


def test_the_gradient_of_the_mask_is_that_of_its_differences():
    generator = torch.Generator().manual_seed(2)
    score = torch.randn(3, 7, generator=generator, dtype=torch.float64).mul(2).requires_grad_()
    assert torch.allclose(with_sum(score, 2.5).sum(1), torch.full((3,), 2.5).double())
    assert torch.autograd.gradcheck(lambda s: with_sum(s, 2.5), (score,))
    steep = (score.detach() * 1e3).requires_grad_()
    with_sum(steep, 2).square().sum().backward()
    assert steep.grad.isfinite().all()


def test_a_fifth_is_rounded_down_and_one_stays_at_least():
    (placement,) = VisionSelector(keep_ratio=0.2).placements(28)
    assert [placement.budget.resolve(n) for n in (4, 9, 14, 576)] == [1, 1, 2, 115]


def test_the_weight_moves_linearly_and_the_settings_stay():
    method = VisionSelector(keep_ratio=0.2)
    assert [method.at(p).weight for p in (0.0, 0.5, 1.0)] == pytest.approx([0.1, 1.05, 2.0])
    assert method.weight == 0.1


def test_what_a_checkpoint_lacks_is_named():
    tensors = {
        f"visual.importance_scorer.q_proj.{kind}": torch.ones(1) for kind in ("weight", "bias")
    }
    with pytest.raises(ConfigError, match=r"ends in importance_scorer\.k_proj\.weight"):
        official_weights(tensors)
    with pytest.raises(ConfigError, match="end_weight must be"):
        VisionSelector(keep_ratio=0.2, end_weight=-1.0)
