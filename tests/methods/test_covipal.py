"""CoViPAL by hand: what the network is shown, who competes, and its masks."""

import dataclasses

import pytest
import torch
from tests.methods.helpers import make_tokens

from vispress.budget import Budget
from vispress.errors import ConfigError
from vispress.memory import Memory
from vispress.methods import CoViPAL
from vispress.methods._parts.scoring.soft_choice import past_threshold, standardised
from vispress.types import ModuleShape

SHAPE = ModuleShape(width=8, vision_width=6, num_layers=32, num_heads=2, vision_layers=2)
SCORES = torch.tensor([[4.0, 1.0, 3.0, 2.0], [0.0, 0.5, -0.5, 1.0]])


def scored(*, training=False, memory=(), scores=SCORES):
    """Tokens in front of layer 8, rated by a table."""
    asked = []

    def module(*given):
        asked.append(given)
        return scores

    tokens = make_tokens(batch=2, grid=(1, 2, 2), dim=8)
    tokens = dataclasses.replace(
        tokens, module=module, depth=(8, 32), training=training, memory=memory
    )
    return tokens, asked


def test_the_best_stay_and_the_network_of_the_layer_is_shown_the_text():
    tokens, asked = scored()
    plan = CoViPAL().plan(tokens, 2)
    assert plan.keep.tolist() == [[0, 2], [1, 3]]
    assert plan.soft is None
    layer, features, text, valid, seen = asked[0]
    assert (layer, valid, seen) == (8, None, None)
    assert torch.equal(features, tokens.features)
    assert torch.equal(text, tokens.text_states)


def test_the_schedule_is_half_before_2_8_and_16_of_32():
    placements = CoViPAL().placements(32)
    assert [p.layer for p in placements] == [2, 8, 16]
    assert [p.budget.resolve(576) for p in placements] == [288, 144, 72]
    assert [p.layer for p in CoViPAL().placements(8)] == [1, 2, 4]
    single = CoViPAL(layers=(2,), num_tokens=64).placements(32)
    assert [(p.layer, p.budget) for p in single] == [(2, Budget(num_tokens=64))]


def test_a_mask_is_a_half_at_the_threshold_and_harder_when_colder():
    """Deviation of 4, 1, 3, 2 about 2.5 is sqrt(5) / 2; the threshold lies between 3 and 2."""
    tokens, _ = scored(training=True)
    plan = CoViPAL(temperature=0.5).plan(tokens, 2)
    by_hand = ((SCORES[0] - 2.5) / 1.25**0.5 / 0.5).sigmoid()
    assert torch.allclose(plan.soft[0], by_hand, atol=1e-6)
    assert plan.keep.tolist() == [[0, 2], [1, 3]]
    cold = CoViPAL(temperature=0.01).plan(tokens, 2).soft
    assert cold[0].round().tolist() == [1, 0, 1, 0]
    assert (cold > 0).all()


def test_the_penalty_is_the_square_of_what_the_mean_is_off():
    tokens, _ = scored(training=True)
    plan = CoViPAL(mask="penalty", temperature=2.0, penalty=3.0).plan(tokens, 1)
    soft = (SCORES / 2.0).sigmoid()
    assert torch.allclose(plan.soft, soft)
    assert torch.allclose(plan.losses["covipal"], 3.0 * (soft.mean(1) - 0.25) ** 2)
    assert not CoViPAL().plan(tokens, 1).losses


def test_what_an_earlier_layer_would_have_dropped_neither_competes_nor_is_seen():
    left = torch.tensor([[False, True, True, True], [True, True, False, True]])
    memory = tuple(Memory(value=row) for row in left)
    tokens, asked = scored(training=True, memory=memory)
    plan = CoViPAL(temperature=0.01).plan(tokens, 1)
    assert plan.keep.tolist() == [[2], [3]]
    assert torch.equal(asked[0][4], left)
    assert [row.value.tolist() for row in plan.memory] == [
        [False, False, True, False],
        [False, False, False, True],
    ]
    of_left = (SCORES[0] - 2.0) / (2 / 3) ** 0.5  # of 1, 3, 2
    middle = (of_left[2] + of_left[3]) / 2
    warm = CoViPAL(temperature=1.0).plan(tokens, 1)
    assert torch.allclose(warm.soft[0], (of_left - middle).sigmoid(), atol=1e-6)


def test_all_that_is_left_counts_whole_and_gradients_are_numbers():
    score = SCORES.clone().requires_grad_()
    among = torch.tensor([[True, False, True, False]] * 2)
    soft = past_threshold(standardised(score, among), 2, 0.1, among)
    soft.sum().backward()
    assert torch.equal(soft[among], torch.ones(4))
    assert score.grad.isfinite().all()
    equal = standardised(torch.ones(1, 3, requires_grad=True))
    assert torch.equal(equal, torch.zeros(1, 3))


def test_the_temperature_falls_by_equal_factors():
    method = CoViPAL(temperature=0.16, end_temperature=0.01)
    found = [method.at(progress).temperature for progress in (0.0, 0.25, 0.5, 1.0)]
    assert found == pytest.approx([0.16, 0.08, 0.04, 0.01])
    assert method.temperature == 0.16


def test_networks_see_each_other_the_text_and_what_is_left():
    module = CoViPAL(width=16, heads=2).make_module(SHAPE)
    assert [name for name, _ in module.named_children()] == ["2", "8", "16"]
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(1, n, 8, generator=generator) for n in (5, 3))
    score = module(8, x, text)
    assert not torch.allclose(score, module(2, x, text))
    changed = x.clone()
    changed[:, 4] = -x[:, 4]
    assert not torch.allclose(module(8, changed, text)[:, :4], score[:, :4], atol=1e-4)
    seen = torch.tensor([[True, True, True, True, False]])
    apart = module(8, x, text, None, seen)
    assert torch.equal(module(8, changed, text, None, seen)[:, :4], apart[:, :4])
    valid = torch.tensor([[True, True, False]])
    assert torch.allclose(module(8, x, text, valid), module(8, x, text[:, :2]), atol=1e-6)
    assert module(8, x, text[:, :0]).isfinite().all()
    assert torch.equal(module(8, x.half(), text.half()), module(8, x.half().float(), text.half()))


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"width": 30}, "width must be a multiple of heads=4, got width=30"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"end_temperature": True}, "end_temperature must be"),
        ({"penalty": -1.0}, "penalty must be"),
        ({"mask": "hard"}, "mask must be one of"),
        ({"layers": (4, 2)}, "layers must"),
    ],
)
def test_bad_settings_are_refused(bad, says):
    with pytest.raises(ConfigError, match=says):
        CoViPAL(**bad)
