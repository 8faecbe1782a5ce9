"""Relevance DPP by hand: what the network hears, and how much its score counts."""

import dataclasses
from itertools import combinations

import pytest
import torch
from tests.methods.helpers import make_tokens
from torch.utils.flop_counter import FlopCounterMode

from vispress.errors import ConfigError
from vispress.flops import flops
from vispress.methods import CDPruner, RelevanceDPP
from vispress.methods._parts.networks.layers import Attend, Dense, Norm, places
from vispress.types import ModuleShape

SHAPE = ModuleShape(width=8, vision_width=6, num_layers=4, num_heads=2, vision_layers=2)


def drawn(method=None):
    """A network whose last layer is not zero."""
    module = (method or RelevanceDPP(num_tokens=3)).make_module(SHAPE)
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return module


def tokens_with(module, **more):
    tokens = make_tokens(grid=(1, 3, 4), **more)
    width = tokens.features.shape[-1]
    return dataclasses.replace(tokens, module=module), width


def test_untrained_it_is_the_dpp_without_a_condition():
    method = RelevanceDPP(num_tokens=4, spread=1.0)
    tokens, width = tokens_with(None)
    shape = dataclasses.replace(SHAPE, width=width)
    tokens = dataclasses.replace(tokens, module=method.make_module(shape))
    expected = CDPruner(num_tokens=4, relevance="none").plan(tokens, 4)
    assert torch.equal(method.plan(tokens, 4).keep, expected.keep)


FEATURES = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.6, 0.8]]])
SCORES = torch.tensor([[0.0, -0.2, -4.0, -1.0]])


def scored():
    """Four tokens with known scores."""
    return dataclasses.replace(
        make_tokens(batch=1, grid=(1, 2, 2)),
        features=FEATURES,
        text_embeddings=torch.ones(1, 3, 2),
        input_embeddings=None,
        text_states=None,
        text_after=2,
        module=lambda x, text: SCORES.to(x),
    )


def cosines():
    unit = torch.nn.functional.normalize(FEATURES[0], dim=-1)
    return unit @ unit.T


def test_of_few_two_are_kept_whose_volume_is_largest():
    """det(L) of a pair is r_i^2 r_j^2 (1 - cos^2); the first of the greedy choice is the best r."""
    method, r, cosine = (
        RelevanceDPP(num_tokens=2, weight=0.5, spread=0.6),
        (0.25 * SCORES[0]).exp(),
        cosines(),
    )

    def volume(i, j):
        return float(r[i] ** 2 * r[j] ** 2 * (1 - cosine[i, j] ** 2))

    best = max(((0, j) for j in (1, 2, 3)), key=lambda pair: volume(*pair))
    assert method.plan(scored(), 2).keep.tolist() == [list(best)]
    # the score decides here: without it the orthogonal pair would stay
    assert best == max(combinations(range(4), 2), key=lambda pair: volume(*pair))
    without = dataclasses.replace(method, weight=0.0)
    assert without.plan(scored(), 2).keep.tolist() == [[0, 2]]


def test_of_many_the_farthest_is_kept_by_relevance():
    """The second has the largest r^2 (1 - cos), the third the largest to the nearer of two."""
    method, cosine = RelevanceDPP(num_tokens=3, weight=0.75, spread=0.5), cosines()
    gain = (2 * 0.75 / 3 * SCORES[0]).exp()
    second = max((1, 2, 3), key=lambda j: float(gain[j] * (1 - cosine[0, j])))
    third = max(
        {1, 2, 3} - {second},
        key=lambda j: float(gain[j] * (1 - max(cosine[0, j], cosine[second, j]))),
    )
    assert method.plan(scored(), 3).keep.tolist() == [sorted([0, second, third])]
    # the score decides here
    assert dataclasses.replace(method, weight=0.5).plan(scored(), 2).keep.tolist() == [[0, 3]]
    assert dataclasses.replace(method, weight=0.0).plan(scored(), 2).keep.tolist() == [[0, 2]]


def test_the_score_counts_less_where_more_stay(monkeypatch):
    seen = []

    def choose(x, num_keep, *, weight, backend):
        seen.append(weight)
        return torch.zeros(len(x), 0, dtype=torch.int64)

    monkeypatch.setattr("vispress.methods.relevance_dpp.maxmin_select", choose)
    for num_keep in (1, 2, 4):
        RelevanceDPP(num_tokens=num_keep, weight=0.5).plan(scored(), num_keep)
    for weight, num_keep in zip(seen, (1, 2, 4), strict=True):
        assert torch.allclose(weight, (2 * 0.5 / num_keep * SCORES).exp())


def test_the_share_of_the_images_own_tokens_decides(monkeypatch):
    calls = []

    def stand_in(name):
        def choose(x, *_, **__):
            calls.append(name)
            return torch.zeros(len(x), 0, dtype=torch.int64)

        return choose

    for name in ("dpp_select", "maxmin_select"):
        monkeypatch.setattr(f"vispress.methods.relevance_dpp.{name}", stand_in(name))
    for spread, num_keep in ((0.5, 1), (0.5, 2), (0.0, 1), (1.0, 3)):
        RelevanceDPP(num_tokens=num_keep, spread=spread).plan(scored(), num_keep)
    assert calls == ["dpp_select", "maxmin_select", "maxmin_select", "dpp_select"]


def test_the_network_hears_the_question_and_its_order():
    module, generator = drawn(), torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 8, generator=generator)
    text = torch.randn(2, 3, 8, generator=generator)
    score = module(x, text)
    assert score.shape == (2, 5)
    assert (score - module(x, text.flip(1))).abs().max() > 1e-3
    assert (score - module(x, -text)).abs().max() > 1e-3
    assert module(x, text[:, :0]).isfinite().all()


def test_padding_behind_a_question_is_not_heard():
    module, generator = drawn(), torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 8, generator=generator)
    text = torch.randn(2, 6, 8, generator=generator)
    valid = torch.arange(6) < torch.tensor([[4], [6]])
    found = module(x, text, valid)
    assert torch.allclose(found[0], module(x[:1], text[:1, :4])[0], atol=1e-5)
    assert torch.allclose(found[1], module(x[1:], text[1:])[0], atol=1e-5)


def test_visual_tokens_have_no_order_of_their_own():
    module, generator = drawn(), torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 5, 8, generator=generator), torch.randn(1, 3, 8, generator=generator)
    assert torch.allclose(module(x.flip(1), text), module(x, text).flip(1), atol=1e-5)


@pytest.mark.parametrize("num_keep", [64, 288])
def test_choosing_takes_little_of_a_prefill(num_keep):
    """Of LLaVA-1.5-7B: 576 visual tokens of width 4096, 32 layers, and 64 words of a question."""
    method = RelevanceDPP(num_tokens=num_keep)
    tokens = dataclasses.replace(
        make_tokens(batch=1, grid=(1, 24, 24)),
        features=torch.randn(1, 576, 4096, generator=torch.Generator().manual_seed(0)),
        text_embeddings=torch.ones(1, 64, 4096),
        input_embeddings=None,
        text_states=None,
        text_after=64,
        module=method.make_module(dataclasses.replace(SHAPE, width=4096)),
    )
    with FlopCounterMode(display=False) as counter:
        method.plan(tokens, num_keep)
    projected = 2 * (576 + 64) * 4096 * 64
    prefill = flops([576] * 32, 4096, 11008, "flop3")
    assert projected < counter.get_total_flops() < 0.001 * prefill


def test_half_precision_is_widened():
    module, generator = drawn(), torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 5, 8, generator=generator), torch.randn(1, 3, 8, generator=generator)
    x, text = x.bfloat16(), text.bfloat16()
    assert module(x, text).dtype == torch.float32
    assert torch.equal(module(x, text), module(x.float(), text.float()))
    assert module(x.double(), text.double()).dtype == torch.float64


def test_every_parameter_learns_within_two_steps():
    method = RelevanceDPP(num_tokens=3)
    module = method.make_module(SHAPE)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 8, generator=generator)
    text = torch.randn(2, 3, 8, generator=generator)
    target = torch.randn(2, 5, generator=generator).softmax(-1)
    for _ in range(2):
        optimizer.zero_grad()
        (-(target * module(x, text).log_softmax(-1)).sum()).backward()
        optimizer.step()
    still = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.abs().max()]
    # a key's bias shifts all logits of a softmax alike, the last bias all scores
    assert all(name.endswith("bias") for name in still), still


def test_layers_are_those_of_torch():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, generator=generator)
    dense, norm = Dense(4, 6), Norm(4)
    linear = torch.nn.Linear(4, 6)
    linear.load_state_dict(dense.state_dict())
    assert torch.equal(dense(x), linear(x))
    assert torch.allclose(norm(x), torch.nn.LayerNorm(4)(x))
    assert not isinstance(dense, torch.nn.Linear)
    assert Dense(4, 6, zero=True)(x).abs().max() == 0
    assert torch.equal(Attend(4, 2)(x[None], x[None, :0]), x[None])
    assert places(3, 4, x)[0].tolist() == [0, 0, 1, 1]


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"weight": -0.1}, "weight"),
        ({"spread": 1.1}, "spread"),
        ({"width": 20, "heads": 4}, "multiple of twice the heads, got width=20 and heads=4"),
        ({"blocks": 0}, "blocks"),
    ],
)
def test_what_cannot_be_is_refused(wrong, says):
    with pytest.raises(ConfigError, match=says):
        RelevanceDPP(num_tokens=3, **wrong)
