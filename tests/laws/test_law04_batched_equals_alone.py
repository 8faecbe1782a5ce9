"""Law 4: each sample of a padded batch gives what it gives alone."""

from typing import Any

import pytest
import torch
from tests.laws.cases import (
    FAMILIES,
    SAMPLES,
    cases,
    exact,
    greedy,
    inputs_of,
    logits_of,
    make,
    model_of,
    on_videos,
    real_positions,
    settings,
)
from tests.tiny import Image, Sample, Text, Video, cache_by_prompts, make_inputs
from torch import Tensor

from vispress import compressed, compression_report
from vispress.errors import CompressionStateError
from vispress.methods import DivPrune


@cache_by_prompts
def alone(family: str, index: int) -> dict[str, Any]:
    """One sample of the common batch, by itself."""
    return make_inputs(family, SAMPLES, only=index)


def kept_of(model: Any) -> list[list[tuple[tuple[int, ...], ...]]]:
    """Kept sets of every image after every placement; none for a prompt without images."""
    try:
        report = compression_report(model)
    except CompressionStateError:
        return [[]]
    return [[tuple(p.kept for p in image.placements) for image in s.images] for s in report.samples]


def assert_each_as_alone(
    family: str,
    options: dict[str, Any],
    batch: dict[str, Any],
    singles: list[dict[str, Any]],
) -> None:
    model = model_of(family)
    with compressed(model, **options):
        together = logits_of(model, real_positions(family, batch))
        kept = kept_of(model)
    for index, single in enumerate(singles):
        with compressed(model, **options):
            expected = logits_of(model, real_positions(family, single))[0]
            assert kept[index] == kept_of(model)[0]
        real = batch["attention_mask"][index].bool()
        assert (together[index][real] - expected).abs().max() < exact(family)


@pytest.mark.parametrize(("family", "method", "padding"), cases(4, turning=("left", "right")))
def test_each_sample_of_a_batch_is_what_it_is_alone(family: str, method: str, padding: str) -> None:
    options = {"method": method} | settings(family, method)
    singles = [alone(family, index) for index in range(len(SAMPLES))]
    assert_each_as_alone(family, options, inputs_of(family, padding), singles)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chain_treats_each_sample_as_if_alone(family: str) -> None:
    chain = [
        DivPrune(keep_ratio=0.6),
        make(family, "pyramiddrop", layers=(2, 3), ratios=(0.5, 0.2)),
    ]
    singles = [alone(family, index) for index in range(len(SAMPLES))]
    assert_each_as_alone(family, {"method": chain}, inputs_of(family), singles)


@pytest.mark.parametrize(("family", "method"), cases("batched videos", on_videos()))
def test_a_sample_with_a_video_is_what_it_is_alone(family: str, method: str) -> None:
    samples = [
        Sample([Text(4), Video(2, 4, 4), Text(3)]),
        Sample([Image(4, 4), Text(9)]),
        Sample([Text(2), Image(4, 6), Text(2), Video(2, 2, 4), Text(5)]),
    ]
    batch = make_inputs(family, samples, padding="left")
    singles = [make_inputs(family, samples, only=index) for index in range(len(samples))]
    assert_each_as_alone(family, {"method": method} | settings(family, method), batch, singles)


@pytest.mark.parametrize(
    ("family", "method"),
    cases(
        4,
        [
            (f, m)
            for f in FAMILIES
            for m in (
                "fastv",
                "visionzip",
            )
        ],
    ),
)
def test_generation_in_a_batch_is_generation_alone(family: str, method: str) -> None:
    model, batch = model_of(family), inputs_of(family)
    length = batch["input_ids"].shape[1]
    with compressed(model, method, **settings(family, method)):
        tokens, steps = greedy(model, batch)
        for index in range(len(SAMPLES)):
            single = alone(family, index)
            own_tokens, own_steps = greedy(model, single)
            own_length = single["input_ids"].shape[1]
            assert torch.equal(tokens[index, length:], own_tokens[0, own_length:])
            assert (steps[index] - own_steps[0]).abs().max() < exact(family)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_order_of_samples_does_not_matter(family: str) -> None:
    samples = [Sample([Text(4), Image(4, 4), Text(6)]), Sample([Image(6, 4), Text(3)])]
    model = model_of(family)
    kept: list[Any] = []
    for order in (samples, samples[::-1]):
        inputs = make_inputs(family, order, padding="left")
        pixels: Tensor = inputs["pixel_values"]
        inputs["pixel_values"] = torch.ones_like(pixels)  # content goes by index: make it equal
        ids = inputs["input_ids"]
        inputs["input_ids"] = torch.where((ids > 2) & (ids < 120), torch.full_like(ids, 7), ids)
        with compressed(model, "fastv", keep_ratio=0.3):
            logits_of(model, real_positions(family, inputs))
            kept.append(kept_of(model))
    assert kept[0] == kept[1][::-1]


def test_another_position_of_the_image_is_noticed() -> None:
    """The comparison can fail: without real positions left padding moves the sample."""
    model, batch = model_of("llava"), inputs_of("llava")
    with compressed(model, "divprune", keep_ratio=0.4):
        together = logits_of(model, batch)[0][batch["attention_mask"][0].bool()]
        own = logits_of(model, alone("llava", 1))[0]
    assert together.shape != own.shape
    with compressed(model, "divprune", keep_ratio=0.4):
        expected = logits_of(model, real_positions("llava", alone("llava", 0)))[0]
    assert (together - expected).abs().max() > exact("llava")
