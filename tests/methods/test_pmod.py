"""p-MoD worked out: counts of the published schedule, budgets, weights of tokens."""

import math

import pytest
import torch
from tests.methods.helpers import make_tokens

from vispress.errors import BudgetError, ConfigError
from vispress.methods import PMoD
from vispress.methods.pmod import Router, Routers
from vispress.types import ModuleShape, Stage

PUBLISHED = (486, 464, 440, 414, 388, 360, 331, 302, 273, 244, 215, 187, 161, 135, 111, 89)
"""Tokens of 576 that run in layers 8 to 23 of 32; behind them it is 86."""


def test_the_published_counts():
    placements = PMoD().placements(32)
    assert [p.layer for p in placements] == list(range(8, 32))
    assert [p.budget.resolve(576) for p in placements] == [*PUBLISHED, *[86] * 8]
    assert all(p.stage is Stage.SKIP and p.until == p.layer + 1 for p in placements)
    assert math.fsum(PMoD().shares(32)) / 32 == pytest.approx(0.5375, abs=1e-4)


def test_the_published_mean_gives_the_published_schedule():
    asked = PMoD(keep_ratio=math.fsum(PMoD().shares(32)) / 32)
    assert asked.shares(32) == pytest.approx(PMoD().shares(32))


@pytest.mark.parametrize("decay", ["cosine", "linear"])
@pytest.mark.parametrize("mean", [0.01, 0.15, 0.3, 0.52, 0.8, 0.97, 0.999, 1.0])
def test_a_mean_is_met(mean, decay):
    for layers in (1, 2, 6, 28, 32):
        shares = PMoD(keep_ratio=mean, decay=decay).shares(layers)
        assert math.fsum(shares) / layers == pytest.approx(mean)
        assert list(shares) == sorted(shares, reverse=True)
        assert min(shares) > 0.0


def test_all_is_kept_by_a_single_placement():
    (placement,) = PMoD(keep_ratio=1.0).placements(32)
    assert (placement.layer, placement.budget.resolve(576)) == (31, 576)


@pytest.mark.parametrize(
    ("decay", "routed"), [("deep", range(2, 7)), ("interleaved", range(1, 8, 2))]
)
def test_shares_that_do_not_decay(decay, routed):
    placements = PMoD(beta=0.25, decay=decay).placements(8)
    assert [p.layer for p in placements] == list(routed)
    assert {p.budget.resolve(100) for p in placements} == {25}
    mean = (8 - 0.5 * len(routed)) / 8
    assert PMoD(keep_ratio=mean, decay=decay).placements(8)[0].budget.resolve(100) == 50
    with pytest.raises(BudgetError, match=rf"decay='{decay}': its dense layers alone leave 0\."):
        PMoD(keep_ratio=0.05, decay=decay).placements(8)


def test_a_number_runs_in_every_routed_layer():
    counts = [p.budget.resolve(576) for p in PMoD(num_tokens=9).placements(32)]
    assert counts == [9] * 24


def routers(*values):
    """Routers of layer 7 that read single features off."""
    made = Routers(8, (7,))
    with torch.no_grad():
        made.get_submodule("7").weight.copy_(torch.tensor(values, dtype=torch.float32))
    return made


def planned(method, module, count=2):
    tokens = make_tokens(grid=(1, 2, 2), batch=1)
    features = torch.zeros(1, 4, 8)
    features[0, :, 0] = torch.tensor([0.5, -2.0, 1.0, 0.5])
    tokens = type(tokens)(
        features=features, index=tokens.index[:1], num_original=4, module=module, depth=(7, 8)
    )
    return method.plan(tokens, count)


def test_logits_choose_and_their_norm_weighs():
    logits, zeros = torch.tensor([0.5, -2.0, 1.0, 0.5]), [0.0] * 7
    plan = planned(PMoD(), routers(1.0, *zeros))
    assert plan.keep.tolist() == [[0, 2]]  # the earlier of equals
    assert plan.bypassed == "gated"
    torch.testing.assert_close(plan.gate[0], 1 + 0.2 * logits.tanh())
    plan = planned(PMoD(norm="sigmoid", scale=1.0), routers(1.0, *zeros))
    torch.testing.assert_close(plan.gate[0], 1 + logits.sigmoid())
    plan = planned(PMoD(norm="softmax", scale=2.0, shift=0.5), routers(1.0, *zeros))
    torch.testing.assert_close(plan.gate[0], 0.5 + 2 * logits.softmax(-1))


def test_logits_rank_where_weights_are_equal():
    plan = planned(PMoD(), routers(1e4, *[0.0] * 7), 1)
    assert plan.gate[0].unique().numel() == 2  # saturated
    assert plan.keep.tolist() == [[2]]


def test_routers_begin_at_weights_of_one():
    shape = ModuleShape(width=8, vision_width=8, num_layers=32, num_heads=2, vision_layers=2)
    module = PMoD().make_module(shape)
    assert [name for name, _ in module.named_children()] == [str(n) for n in range(8, 32)]
    assert sum(p.numel() for p in module.parameters()) == 24 * 9
    assert not any(p.any() for p in module.parameters())
    plan = planned(PMoD(), Routers(8, (7,)))
    assert plan.keep.tolist() == [[0, 1]]
    assert torch.equal(plan.gate, torch.ones(1, 4))
    assert not isinstance(module.get_submodule("8"), torch.nn.Linear)


def test_both_kinds_of_tokens_train_the_router():
    module = routers(*[0.0] * 8)
    gate = planned(PMoD(), module).gate
    for tokens in ([0, 2], [1, 3]):
        (gradient,) = torch.autograd.grad(gate[0, tokens].sum(), module.get_submodule("7").weight,
                                          retain_graph=True)  # fmt: skip
        assert gradient[0] != 0


def test_half_precision_is_widened_before_it_is_summed():
    router = Router(512)
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    features = torch.randn(1, 9, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    got = router(features)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, router.double()(features.double()).float())


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"low": 0.9}, "low must be at most high=0.85, got 0.9"),
        ({"beta": 0.0}, "beta must be a number above 0"),
        ({"scale": -1.0}, "scale must be a number above 0"),
        ({"decay": "cubic"}, "decay"),
        ({"norm": "none"}, "norm"),
    ],
)
def test_what_is_out_of_range_is_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        PMoD(**options)
