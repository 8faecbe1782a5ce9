"""What a method is told of a layer's transitions and updates is what it did to its rows."""

from functools import partial
from typing import Any

import pytest
import torch
from tests.laws import cases
from tests.tiny import FAMILIES, Image, Sample, Text, make_inputs
from tests.tiny_models import IMAGE_ID
from torch import Tensor

from vispress import compress_model, remove_compression
from vispress.adapters.base import find_adapter

SAMPLES = (
    Sample([Text(5), Image(4, 4), Text(7)]),
    Sample([Text(2), Image(4, 4), Text(3)]),
)


def watched(model: Any, seen: dict[tuple[int, int], tuple[Tensor, Tensor]]) -> list[Any]:
    """Hooks that note norm ratio and cosine, `[B, P]`, of attention and MLP of every layer."""

    def note(key: tuple[int, int], args: Any, kwargs: Any, output: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        y = output[0] if isinstance(output, tuple) else output
        seen[key] = (y.norm(dim=-1) / x.norm(dim=-1), torch.cosine_similarity(x, y, dim=-1))

    return [
        sub.register_forward_hook(
            lambda _, args, kwargs, output, key=(number, part): note(key, args, kwargs, output),
            with_kwargs=True,
        )
        for number, layer in enumerate(find_adapter(model).decoder_layers)
        for part, sub in enumerate((layer.self_attn, layer.mlp))  # type: ignore[arg-type]
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_transitions_are_those_of_the_layers_that_ran(family: str) -> None:
    model, inputs = cases.model_of(family), make_inputs(family, SAMPLES, padding="left")
    spy, seen = cases.Spy(), {}
    hooks = watched(model, seen)
    compress_model(model, spy.watch(cases.make(family, "transprune")))
    try:
        cases.logits_of(model, inputs)
    finally:
        remove_compression(model)
        for hook in hooks:
            hook.remove()
    image, real = inputs["input_ids"] == IMAGE_ID, inputs["attention_mask"].bool()
    whole = []
    for number, (tokens, _) in enumerate(spy.seen):
        row = number % len(SAMPLES)  # unlike texts: a bucket a sample, in order
        assert tokens.batch == 1
        for step in tokens.transition or ():
            magnitude, cosine = (
                torch.stack([seen[step.layer, part][measure][row] for part in range(2)])
                for measure in range(2)
            )
            valid = step.sequence_valid[0]
            torch.testing.assert_close(step.sequence_cosine[0], cosine)
            whole.append(valid.shape == real[row].shape)
            if whole[-1]:  # nothing was dropped before this layer
                assert torch.equal(valid, real[row])
                places = image[row].nonzero()[:, 0][tokens.index[0]]
                torch.testing.assert_close(step.magnitude[0], magnitude[:, places])
                torch.testing.assert_close(step.cosine[0], cosine[:, places])
                continue
            for one, rows in ((step.magnitude[0], magnitude), (step.cosine[0], cosine)):
                apart = one[:, :, None] - rows[:, None, valid]
                assert float(apart.abs().amin(dim=-1).max()) < 1e-9
    assert set(whole) == {True, False}


@pytest.mark.some(cases=3)
@pytest.mark.parametrize("family", FAMILIES)
def test_updates_are_what_the_layer_before_added(family: str) -> None:
    model, inputs = cases.model_of(family), make_inputs(family, SAMPLES, padding="left")
    layers: Any = find_adapter(model).decoder_layers
    spy, arrived, entered, method = cases.Spy(), {}, {}, cases.make(family, "v2drop")

    def note(into: dict[int, Tensor], number: int, _: Any, args: Any, kwargs: Any) -> None:
        into[number] = args[0] if args else kwargs["hidden_states"]

    compress_model(model, spy.watch(method))
    hooks = []
    for number, layer in enumerate(layers):
        # in front of a layer all rows arrive; behind its placements some enter
        for module, into in ((layer, arrived), (layer.input_layernorm, entered)):
            watch = partial(note, into, number)
            hooks.append(module.register_forward_pre_hook(watch, with_kwargs=True))
    try:
        cases.logits_of(model, inputs)
    finally:
        remove_compression(model)
        for hook in hooks:
            hook.remove()
    image = inputs["input_ids"] == IMAGE_ID
    stages = [place.layer for place in method.placements(len(layers))]
    # no text is read: both samples are one bucket
    shown = [(row, tokens) for tokens, _ in spy.seen for row in range(tokens.batch)]
    assert len(shown) == len(stages) * len(SAMPLES)
    for number, (row, tokens) in enumerate(shown):
        stage = stages[number // len(SAMPLES)]
        norms = (arrived[stage] - entered[stage - 1])[row].norm(dim=-1).float()
        if stage == stages[0]:
            own = norms[image[row].nonzero()[:, 0]]
            torch.testing.assert_close(tokens.update_norm[row], own)
        else:  # rows have gone since
            apart = tokens.update_norm[row][:, None] - norms[None]
            assert float(apart.abs().amin(dim=-1).max()) < 1e-5
