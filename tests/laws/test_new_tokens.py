"""New tokens of a trained method (HICom): the loss of answers moves as its gradient says."""

import math
from typing import Any

import pytest
import torch
from tests.laws.cases import FAMILIES, inputs_of
from tests.laws.test_law10_training import labels_of, training
from tests.laws.test_law17_parameters import compressed_anew
from torch import Tensor, nn

from vispress.adapters.base import find_adapter
from vispress.methods import HICom

SETTINGS = [
    HICom(num_tokens=9),
    HICom(num_tokens=9, local_injection="fine", global_injection="off"),
    HICom(num_tokens=9, local_injection="coarse", global_injection="fine"),
]
CASES = [(family, SETTINGS[number % 3]) for number, family in enumerate(FAMILIES)]


def fine_loss(model: Any, inputs: Any) -> Tensor:
    """In fp64, where transformers' own is fp32."""
    logits, targets = model(**inputs).logits[:, :-1], labels_of(inputs)[:, 1:]
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.some(cases=4)
@pytest.mark.parametrize(("family", "method"), [pytest.param(*case, id=case[0]) for case in CASES])
def test_gradients_of_new_tokens_are_true(family: str, method: HICom) -> None:
    """Central differences along the parameters and the projector.

    The step is large against the rounding of transformers' fp32 norms.
    """
    model, inputs = compressed_anew(family, method), inputs_of(family)
    model.double()  # the method's parameters, too
    projector = [p for p in find_adapter(model).projector.parameters() if p.ndim == 2]
    own = [p for n, p in model.named_parameters() if "vispress_modules" in n]
    for parameters in (own, projector):
        generator = torch.Generator().manual_seed(1)
        ways = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        step = 1e-2 / math.sqrt(sum(way.numel() for way in ways))
        with training(model):
            found = torch.autograd.grad(fine_loss(model, inputs), parameters)
            slope = sum(float((g * way).sum()) for g, way in zip(found, ways, strict=True))
            losses = []
            for distance in (step, -2 * step, step):
                with torch.no_grad():
                    for parameter, way in zip(parameters, ways, strict=True):
                        parameter.add_(way, alpha=distance)
                    losses.append(float(fine_loss(model, inputs)))
        measured = (losses[0] - losses[1]) / (2 * step)
        assert slope != 0
        assert measured == pytest.approx(slope, rel=0.02)


def test_no_gradient_reaches_the_text_through_a_method() -> None:
    """What methods read of the text is as of a frozen LLM: `docs/training.md` says so."""
    model, inputs = compressed_anew("llava", HICom(num_tokens=9)), inputs_of("llava")
    table = model.get_input_embeddings().weight
    seen: list[Tensor] = []
    module = find_adapter(model).base.vispress_modules.get_submodule("0")
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    with training(model):
        loss = fine_loss(model, inputs)
    hook.remove()
    assert seen
    assert not any(text.requires_grad for text in seen)
    assert torch.autograd.grad(loss, table)[0].any()  # by way of the LLM
