"""Gamma-MoD worked out: layers, budgets, weights of tokens, the loss, ranks of maps."""

import pytest
import torch
from torch import nn

from vispress.errors import BudgetError, ConfigError
from vispress.methods import GammaMoD
from vispress.methods.gamma_mod import SharedRouter, arank
from vispress.types import ModuleShape, Stage, VisualTokens, full_index


def test_layers_and_counts_of_the_published_model():
    placements = GammaMoD().placements(32)
    assert [p.layer for p in placements] == list(range(3, 31))
    assert all(p.stage is Stage.SKIP and p.until == p.layer + 1 for p in placements)
    assert {p.budget.resolve(1059) for p in placements} == {1059 - 529}
    assert {p.budget.resolve(576) for p in GammaMoD(capacity=0.34).placements(32)} == {576 - 195}
    assert [p.layer for p in GammaMoD().placements(6)] == [1, 2, 3, 4]
    assert [p.layer for p in GammaMoD(layers=(2, 5)).placements(6)] == [2, 5]


@pytest.mark.parametrize("mean", [0.2, 0.55, 0.9, 1.0])
def test_a_mean_is_met(mean):
    (budget,) = {p.budget for p in GammaMoD(keep_ratio=mean).placements(32)}
    assert (4 + 28 * (budget.keep_ratio or 0)) / 32 == pytest.approx(mean)
    assert {p.budget.resolve(99) for p in GammaMoD(num_tokens=9).placements(32)} == {9}


def test_a_mean_below_that_of_the_other_layers_is_refused():
    with pytest.raises(BudgetError, match=r"that are no MoD layers alone leave 0\.125"):
        GammaMoD(keep_ratio=0.1).placements(32)
    with pytest.raises(ConfigError, match="at least 3 decoder layers, got 2"):
        GammaMoD().placements(2)
    with pytest.raises(ConfigError, match="layers must be an integer"):
        GammaMoD(layers=(32,)).placements(32)


def planned(method, values, count=2, norm=None):
    """A plan of tokens with one feature, which is the second logit; the first one is 0."""
    features = torch.tensor(values)[None, :, None]
    module = SharedRouter(1)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[0.0], [1.0]]))
    tokens = VisualTokens(
        features=features, index=full_index(1, len(values), features.device),
        num_original=len(values), module=module, input_norm=norm or nn.Identity(),
    )  # fmt: skip
    return method.plan(tokens, count), module


def test_the_highest_run_and_are_weighted():
    values = [0.5, -2.0, 1.0, 0.5]
    plan, _ = planned(GammaMoD(), values)
    assert plan.keep.tolist() == [[0, 2]]  # the earlier of equals
    assert plan.bypassed == "identity"
    p = torch.tensor(values).sigmoid()
    torch.testing.assert_close(plan.gate[0].detach(), p)
    entropy = -(p[0].log() + p[2].log() + (1 - p[1]).log() + (1 - p[3]).log()) / 4
    torch.testing.assert_close(plan.losses["gamma_mod"].detach(), 0.01 * entropy[None])


def test_a_threshold_decides_how_many():
    method = GammaMoD(threshold=0.5)
    assert all(p.adaptive for p in method.placements(32))
    plan, _ = planned(method, [0.5, -2.0, 1.0, 0.5], 4)
    assert [keep.tolist() for keep in plan.keep] == [[0, 2, 3]]
    with pytest.raises(ConfigError, match="leave out a budget"):
        GammaMoD(threshold=0.5, keep_ratio=0.5)


def test_the_norm_is_in_front_of_the_router():
    plan, _ = planned(GammaMoD(), [3.0, -3.0], 1, norm=lambda x: -x)
    assert plan.keep.tolist() == [[1]]


def test_the_loss_drives_p_apart():
    values = [0.5, -2.0, 1.0, 0.4]
    plan, module = planned(GammaMoD(loss_weight=1.0), values)
    (gradient,) = torch.autograd.grad(plan.losses["gamma_mod"].sum(), module.weight)
    with torch.no_grad():
        module.weight -= 0.1 * gradient
    features = torch.tensor(values)[None, :, None]
    after = module(features).softmax(-1)[0, :, 1]
    assert after[2] > plan.gate[0, 2]
    assert after[1] < plan.gate[0, 1]


def test_one_router_begins_as_a_linear_layer_does():
    shape = ModuleShape(width=64, vision_width=8, num_layers=32, num_heads=2, vision_layers=2)
    torch.manual_seed(3)
    module = GammaMoD().make_module(shape)
    assert [tuple(p.shape) for p in module.parameters()] == [(2, 64)]
    torch.manual_seed(3)
    assert torch.equal(module.weight, nn.Linear(64, 2, bias=False).weight)


def test_ranks_leave_out_the_diagonal():
    causal = torch.ones(1, 6, 6).tril() / torch.arange(1, 7)[:, None]
    assert arank(causal).tolist() == [5.0]
    assert arank(torch.eye(6)[None]).tolist() == [0.0]
    sink = torch.zeros(1, 6, 6)
    sink[0, 1:, 0] = 1.0
    assert arank(sink).tolist() == [1.0]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"capacity": 1.0}, "capacity must be below 1"),
        ({"threshold": 1.0}, "threshold must be below 1"),
        ({"loss_weight": -0.1}, "loss_weight must be a number of at least 0"),
        ({"layers": (3, 2)}, "layers must be strictly ascending"),
    ],
)
def test_what_is_out_of_range_is_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        GammaMoD(**options)
