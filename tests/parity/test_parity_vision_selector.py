"""VisionSelector against the official code: scores, what stays, the mask, its gradient and loss."""

import dataclasses

import pytest
import torch
from tests.methods.helpers import only
from tests.parity.vectors import close, each_case, same_kept

from vispress.methods import VisionSelector
from vispress.methods.vision_selector import ImportanceScorer, official_weights
from vispress.types import ModuleShape


def scorer(case):
    """The network with the case's parameters, read as from an official checkpoint."""
    shape = ModuleShape(
        width=case["in/features"].shape[1],
        vision_width=8, num_layers=32, num_heads=2, vision_layers=2,
    )  # fmt: skip
    module = VisionSelector(keep_ratio=0.5).make_module(shape)
    assert isinstance(module, ImportanceScorer)
    names = {"q_proj.weight": "q_w", "q_proj.bias": "q_b", "k_proj.weight": "k_w"}
    names["k_proj.bias"] = "k_b"
    tensors = {
        f"model.visual.importance_scorer.{name}": case[f"in/{key}"] for name, key in names.items()
    }
    module.load_state_dict(official_weights(tensors | {"visual.merger.weight": torch.ones(1)}))
    return module


@each_case("vision_selector", having="out/score")
def test_scores_choices_masks_and_losses(case):
    method = VisionSelector(keep_ratio=case["param/budget"], weight=1.0)
    features, module = case["in/features"][None], scorer(case)
    (placement,) = method.placements(28)
    count = placement.budget.resolve(features.shape[1])
    tokens = only(features=features, module=module)
    score = module(features)[0].detach()
    close(score, case["out/score"])
    same_kept(case, method.plan(tokens, count).keep[0], case["out/keep_sorted"], score)

    plan = method.plan(dataclasses.replace(tokens, training=True), count)
    assert float(plan.soft.sum()) == pytest.approx(count, abs=1e-3)
    close(plan.soft[0].detach(), case["out/soft_mask"])
    close((features * plan.soft.unsqueeze(-1))[0].detach(), case["out/soft_features"])
    hard = torch.zeros(features.shape[1]).scatter(0, plan.keep[0], 1.0)
    assert torch.equal(hard, case["out/hard_target"])
    close(plan.losses["vision_selector"][0].detach(), torch.tensor(case["out/constraint_loss"]))
    (plan.soft[0] * case["in/upstream"]).sum().backward()
    close(module.query.bias.grad, case["out/grad_q_bias_of_upstream_dot_mask"], atol=1e-4)


@each_case("vision_selector", having="out/weight_f64")
def test_the_weight_grows_with_the_steps(case):
    method = VisionSelector(
        keep_ratio=0.2, weight=case["param/start"], end_weight=case["param/end"]
    )
    for step, weight in zip(case["param/steps"].tolist(), case["out/weight_f64"], strict=True):
        progress = min(1.0, step / case["param/total_steps"])
        assert method.at(progress).weight == pytest.approx(float(weight))
