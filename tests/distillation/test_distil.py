"""The loop that teaches a network what a model attends to."""

import pytest
import torch
from torch import nn

from vispress.distillation.distil import distil, divergence
from vispress.distillation.scenes import training_prompts
from vispress.distillation.targets import Heard
from vispress.errors import ConfigError
from vispress.methods import RelevanceDPP
from vispress.types import ModuleShape

SHAPE = ModuleShape(width=8, vision_width=8, num_layers=4, num_heads=2, vision_layers=2)


def network() -> nn.Module:
    torch.manual_seed(0)
    method = RelevanceDPP(num_tokens=2, width=16, heads=2, blocks=1)
    return method.make_module(SHAPE)


def examples(number: int = 60) -> list[Heard]:
    """Targets that follow one feature, up or down as the question says; two sizes."""
    generator, found = torch.Generator().manual_seed(0), []
    for place in range(number):
        x = torch.randn(6 + place % 2, 8, generator=generator)
        text = torch.randn(2 + place % 3, 8, generator=generator)
        text[:, 0] = 3 * (-1) ** (place // 2)
        found.append(Heard(x, text, (x[:, 0] * text[0, 0].sign() * 2).softmax(0)))
    return found


@pytest.mark.slow
def test_the_divergence_falls_on_what_is_held_out_too() -> None:
    heard, told = examples(200), list[float]()
    curve = distil(
        network(), heard, loss=divergence, steps=150, batch=32, lr=1e-2, advance=told.append
    )
    assert len(curve.loss) == 150
    assert told == curve.loss
    before, after = curve.held_out
    assert after < 0.7 * before


def test_equal_seeds_give_equal_parameters_and_others_do_not() -> None:
    heard, found = examples(), []
    for seed in (0, 0, 1):
        module = network()
        distil(module, heard, loss=divergence, steps=3, batch=8, seed=seed)
        found.append(torch.cat([p.flatten() for p in module.parameters()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_the_divergence_is_its_formula_and_padding_is_not_heard() -> None:
    module, heard = network(), examples()[:5:2]
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    by_hand = torch.stack(
        [
            (h.target * (h.target.log() - module(h.features[None], h.text[None])[0].log_softmax(0)))
            .sum()
            for h in heard
        ]
    ).mean()  # fmt: skip
    assert len({len(h.text) for h in heard}) > 1
    assert torch.allclose(divergence(module, heard), by_hand, atol=1e-5)


def test_too_little_and_frozen_parameters_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 20 images with a question behind them, got 19"):
        distil(network(), examples(19), loss=divergence, steps=1)
    module = network()
    next(module.parameters()).requires_grad_(False)
    with pytest.raises(ConfigError, match=r"visual.0.weight is frozen"):
        distil(module, examples(), loss=divergence, steps=1)


def test_training_prompts_repeat_and_differ_by_seed() -> None:
    first, again, other = (list(training_prompts(9, seed)) for seed in (0, 0, 1))
    texts = [[p.text for p in prompts] for prompts in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]
    assert len(first) == 9
    assert first[0].images[0].tobytes() == again[0].images[0].tobytes()
    assert len({p.images[0].tobytes() for p in first}) == 3  # four about a scene


def test_one_draw_in_four_may_show_several_pictures() -> None:
    alone, mixed = (list(training_prompts(40, episodes=several)) for several in (False, True))
    assert len(mixed) == 40
    assert mixed[:12] == alone[:12]
    shown = [len(prompt.images) for prompt in mixed]
    # two pictures, two examples and a question, three frames
    assert shown[12:16] == [2] * 4
    assert shown[28:32] == [3] * 4
    assert {len(prompt.images) for prompt in alone} == {1}
    assert all(p.text.count("<image>") == len(p.images) == len(p.evidence) for p in mixed)
