"""Adapters of newer families against the models."""

from typing import Any

import pytest
import torch
from tests.adapters.test_adapters import IMAGES, Seen
from tests.laws.table import fits, model_of
from tests.laws.test_law04_batched_equals_alone import (
    test_each_sample_of_a_batch_is_what_it_is_alone as assert_alone_is_batched,
)
from tests.tiny import NEWER, Sample, make_inputs, visual_positions

from vispress.adapters.base import find_adapter

ROUNDING = 1e-5  # norms of some projectors are fp32


@pytest.mark.parametrize("family", NEWER)
def test_placeholders_layouts_and_projected_inputs_are_the_models(family: str) -> None:
    seen = Seen(family, "image", IMAGES)
    items = [p for s in visual_positions(family, seen.model, seen.inputs) for p in s]
    assert seen.counts == [len(p) for p in items]
    placeholder = seen.adapter.placeholders()["image"]
    assert sum(seen.counts) == int((seen.inputs["input_ids"] == placeholder).sum())
    rows = seen.adapter.projector_inputs("image", seen.raw, seen.call)
    packed = seen.adapter.pack("image", rows, seen.call)
    assert len(packed) == len(seen.features)
    for inputs, own, (grid, crops) in zip(packed, seen.features, seen.layouts, strict=True):
        kept = torch.ones(len(own), dtype=torch.bool) if crops is None else crops.segment >= 0
        assert crops is not None or (grid is not None and grid[0] * grid[1] * grid[2] == len(own))
        with torch.no_grad():
            mine = seen.adapter.project(seen.adapter.projector, inputs)
            pair = seen.adapter.project(seen.adapter.projector, torch.stack([inputs, inputs]))
        assert (mine - own)[kept].abs().max() < ROUNDING
        assert (pair[1] - own)[kept].abs().max() < ROUNDING


@pytest.mark.parametrize("family", NEWER)
def test_the_feature_layer_is_the_last_one_read(family: str) -> None:
    """A change behind it changes nothing; one in front of it does."""
    model = model_of(family)
    adapter, inputs = find_adapter(model), make_inputs(family, [Sample()])
    attentions = adapter.encoder_attentions()

    def doubled(module: Any, args: Any, out: Any) -> Any:
        return (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out

    with torch.no_grad():
        before = model(**inputs).logits
        for number, attention in enumerate(attentions):
            handle = attention.register_forward_hook(doubled)
            changed = not torch.equal(model(**inputs).logits, before)
            handle.remove()
            assert changed == (number <= adapter.feature_layer())


@pytest.mark.parametrize("family", [f for f in NEWER if fits(f, "visionzip")])
def test_attention_of_the_encoder_is_that_of_each_image(family: str) -> None:
    """Images of one call do not mix, whether the encoder packs them or not."""
    assert_alone_is_batched(family, "visionzip", "left")
