"""A compressed prefill never holds more memory at its peak than the uncompressed one."""

from typing import Any

import pytest
import torch
from tests.laws.cases import make
from tests.tiny import Image, Sample, Text, build, make_inputs

from vispress import compressed
from vispress.bench.timing.memory import LiveBytes


def peak(model: Any, inputs: dict[str, Any]) -> int:
    with torch.no_grad():
        model(**inputs)  # warm: lasting buffers of transformers
        with LiveBytes() as memory:
            model(**inputs, logits_to_keep=1)
    return memory.peak


# text enough for the language model to be the peak, as it is in real models (attention columns that
# the encoder leaves behind are 1 % of its own peak)
@pytest.mark.some(cases=3)
@pytest.mark.parametrize(
    "method",
    ["fastv", "fastervlm", "divprune", "pyramiddrop", "transprune", "visionzip", "fourier"],
)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_peak_is_not_above_the_uncompressed_one(family: str, method: str) -> None:
    model = build(family, dtype=torch.float32)
    size = Image(12, 12)
    samples = [Sample([Text(300), size, Text(2), size, Text(4)])] * 2
    inputs = make_inputs(family, samples, dtype=torch.float32)
    plain = peak(model, inputs)
    more: dict[str, Any] = {} if method in ("pyramiddrop", "transprune") else {"keep_ratio": 0.25}
    with compressed(model, make(family, method, **more)):
        got = peak(model, inputs)
    # schedules run their first layers whole: what they note of each token there (positions,
    # transition measures) comes on top; 24 bytes a layer are 0.3 % of a 7B model's hidden row
    late = method in ("pyramiddrop", "transprune")
    notes = 24 * inputs["input_ids"].numel() * 6 if late else 0
    assert got <= plain + notes


def test_the_meter_sees_a_large_tensor() -> None:
    with LiveBytes() as memory:
        x = torch.zeros(1000)
        y = x + 1
        del x
        z = y * 2
    assert memory.peak == 8000
    assert z.shape == (1000,)
