"""What a method is told of a layer's transitions is what that layer's modules did to its rows."""

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
