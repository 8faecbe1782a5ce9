"""Arguments of a call that change what visual tokens are: honoured, or refused by name."""

from typing import Any

import pytest
import torch
from tests.laws.cases import METHODS, fits, greedy, inputs_of, logits_of, make, model_of
from tests.tiny import build

from vispress import compressed
from vispress.adapters.base import find_adapter
from vispress.decoding.damro import DAMRO
from vispress.errors import UnsupportedModelError
from vispress.types import ATTENTION_SIGNALS, Signal

TOWERS = ("llava", "llava_next", "llava_onevision", "internvl")
LAYER, STRATEGY = "vision_feature_layer", "vision_feature_select_strategy"

HONOURED = ("divprune", "fastv", "zoo_prune", "fourier", "pyramiddrop")
"""Of the methods that read nothing of the encoder's layers."""


def other_layer(model: Any) -> int:
    """An encoder layer that is not the config's, counted from the end."""
    return -3 if model.config.vision_feature_layer == -2 else -2


def reads_encoder(family: str, method: str) -> bool:
    compressor = make(family, method)
    reads = compressor.signals() & (ATTENTION_SIGNALS | {Signal.VISION_KEYS})
    return bool(reads) or compressor.changes_encoder()


@pytest.mark.some(cases=2)
@pytest.mark.parametrize("family", TOWERS)
def test_another_encoder_layer_is_honoured_or_refused(family: str) -> None:
    """Methods that read nothing of the encoder give what a model with that config gives."""
    model, other = model_of(family), build(family)
    layer = other_layer(model)
    other.config.vision_feature_layer = layer
    inputs = inputs_of(family)
    for method in METHODS:
        if not fits(family, method):
            continue
        compressor = make(family, method)
        with compressed(model, compressor) as report:
            if reads_encoder(family, method):
                with pytest.raises(UnsupportedModelError) as caught:
                    logits_of(model, inputs | {LAYER: layer})
                message = str(caught.value)
                assert f"{LAYER}={layer}: the model was compressed for encoder layer" in message
                assert f"{method} would score" in message
                assert "before compress_model" in message
                continue
            if method not in HONOURED:
                continue
            found, kept = logits_of(model, inputs | {LAYER: layer}), report.samples
        with compressed(other, compressor) as again:
            assert torch.equal(found, logits_of(other, inputs))
            assert kept == again.samples


@pytest.mark.parametrize("family", TOWERS)
def test_the_same_layer_named_from_either_end_is_no_other_layer(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family)
    layers = len(find_adapter(model).encoder_attentions())
    layer = model.config.vision_feature_layer
    named = layer + layers + 1 if layer < 0 else layer - layers - 1
    scores = {} if find_adapter(model).has_cls else {"scores": "column_mean"}
    with compressed(model, "visionzip", keep_ratio=0.4, **scores):
        expected = logits_of(model, inputs)
        usual = {LAYER: layer, STRATEGY: model.config.vision_feature_select_strategy}
        assert torch.equal(logits_of(model, inputs | usual), expected)
        if family != "internvl":  # to it, -1 is the output behind a last norm
            assert torch.equal(logits_of(model, inputs | {LAYER: named}), expected)


@pytest.mark.parametrize("method", ["divprune", "fastv", "visionzip", "tome"])
@pytest.mark.parametrize(("name", "value"), [(STRATEGY, "full"), (LAYER, [-2, -1]), (LAYER, [-2])])
def test_other_visual_tokens_are_refused_for_every_method(
    name: str, value: Any, method: str
) -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    refusal = pytest.raises(UnsupportedModelError, match=f"{name}=.*would be others.*Leave it out")
    with compressed(model, make("llava", method)), refusal:
        logits_of(model, inputs | {name: value})


def test_a_config_changed_after_compression_is_noticed() -> None:
    model, inputs = build("llava"), inputs_of("llava")
    with compressed(model, "fastervlm", keep_ratio=0.4):
        model.config.vision_feature_layer = -1
        with pytest.raises(UnsupportedModelError, match=f"{LAYER}=-1: .*fastervlm"):
            logits_of(model, inputs)


def test_generate_refuses_likewise() -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    refusal = pytest.raises(UnsupportedModelError, match=f"{LAYER}=-1: .*fastervlm")
    with compressed(model, "fastervlm", keep_ratio=0.4), refusal:
        greedy(model, inputs | {LAYER: -1})


def test_damro_refuses_likewise() -> None:
    inputs = inputs_of("llava")
    with pytest.raises(UnsupportedModelError, match=f"{LAYER}=-1: .*DAMRO"):
        DAMRO(model_of("llava"), inputs | {LAYER: -1})
