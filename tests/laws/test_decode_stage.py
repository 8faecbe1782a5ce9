"""Laws 1, 4 and 9 for the decode stage: every step equals the model masked as the rule says."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.laws.cases import model_of, real_positions, run
from tests.laws.decoding import Stepping, stepping
from tests.laws.masked import masked_model
from tests.laws.test_law09_generation_modes import MODES, ORDERED, oracle_of
from tests.tiny import VIDEO, Image, Sample, Text, Video, make_inputs
from tests.tiny_models import VIDEO_ID

from vispress import compressed
from vispress.methods import LVLMCSP, DyCoke, FastV

# two lengths, a second video in one sample, an image beside it, one sample of text alone
SAMPLES = [
    Sample([Text(3), Video(3, 4, 4), Text(6)]),
    Sample([Text(2), Video(3, 4, 6), Text(3), Video(3, 4, 4), Text(4), Image(4, 4), Text(2)]),
    Sample([Text(7)]),
]
ONE_VIDEO = [
    SAMPLES[0],
    Sample([Text(2), Video(3, 4, 6), Text(4), Image(4, 4), Text(2)]),
    SAMPLES[2],
]
NEW = 7
OPTIONS: dict[str, dict[str, Any]] = {
    "published": {},
    "budget": {"keep_ratio": 0.4},
    "often": {"similarity": 0.999},
    "seldom": {"similarity": 0.5},
    "quirks": {"similarity": 0.5, "reference_quirks": True},
    "third_layer": {"decode_layer": 2, "keep_ratio": 0.6},
    "none_seen": {"decode_pruned": 1.0},
    "whole": {"pruned": 0.0},
}


def generate(model: Any, inputs: dict[str, Any], **mode: Any) -> Any:
    torch.manual_seed(7)
    return model.generate(
        **inputs, **({"do_sample": False} | mode), max_new_tokens=NEW, min_new_tokens=NEW,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip


def batch(family: str, samples: list[Sample] = SAMPLES, **more: Any) -> dict[str, Any]:
    return make_inputs(family, samples, padding="left", **more)


@contextmanager
def oracle(family: str, method: Any, inputs: dict[str, Any]) -> Iterator[Stepping]:
    """Inside, the untouched model masks what the method drops and hides."""
    model = model_of(family)
    chain = method if isinstance(method, list) else [method]
    result = run(model, real_positions(family, inputs), chain)
    steps = stepping(model, chain[0], result.report)
    assert steps is not None
    with masked_model(model, oracle_of(result, inputs), result.positions, result.values, steps):
        yield steps


def assert_same(got: Any, expected: Any) -> None:
    assert torch.equal(got.sequences, expected.sequences)
    difference = torch.stack(got.logits, 1) - torch.stack(expected.logits, 1)
    assert difference.abs().max() < 1e-5


@pytest.mark.some(cases=8)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("family", VIDEO)
def test_every_step_equals_the_masked_model(family: str, options: str) -> None:
    model, inputs, method = model_of(family), batch(family), DyCoke(**OPTIONS[options])
    with oracle(family, method, inputs) as steps:
        expected = generate(model, inputs)
    if options in ("seldom", "quirks"):
        assert steps.stays
    if options == "often":
        assert steps.changes
    with compressed(model, method):
        assert_same(generate(model, inputs), expected)


@pytest.mark.some(cases=5)
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "greedy"])
@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_mode_equals_the_masked_model(family: str, mode: str) -> None:
    one_video = {"num_beams", "num_return_sequences"} & set(MODES[mode]) and not ORDERED
    inputs = batch(family, ONE_VIDEO if one_video else SAMPLES)
    model, method = model_of(family), DyCoke(similarity=0.5)
    with oracle(family, method, inputs):
        plain = {k: v for k, v in MODES[mode].items() if k != "cache_implementation"}
        expected = generate(model, inputs, **plain)
    with compressed(model, method):
        assert_same(generate(model, inputs, **MODES[mode]), expected)


def test_a_video_at_the_very_start_is_chosen_from_on_a_static_cache() -> None:
    """Slots in which nothing is stored yet say that they hold position 0."""
    family = "llava_onevision"
    model, inputs = model_of(family), make_inputs(family, [Sample([Video(3), Text(6)], bare=True)])
    assert int(inputs["input_ids"][0, 0]) == VIDEO_ID
    with compressed(model, DyCoke(decode_pruned=0.1)):
        expected = generate(model, inputs)
        assert_same(generate(model, inputs, cache_implementation="static"), expected)


def test_a_chain_chooses_among_what_reaches_the_layer() -> None:
    family = "llava_onevision"
    model, inputs = model_of(family), batch(family)
    for layer in (1, 3):  # in front of the layer that is read, and behind it
        chain = [DyCoke(decode_layer=2), FastV(keep_ratio=0.5, layer=layer)]
        result = run(model, real_positions(family, inputs), chain, positions="original")
        steps = stepping(model, chain[0], result.report)
        with masked_model(model, oracle_of(result, inputs), "original", result.values, steps):
            expected = generate(model, inputs)
        with compressed(model, chain, positions="original"):
            assert_same(generate(model, inputs), expected)


@pytest.mark.parametrize("family", VIDEO)
def test_each_sample_chooses_as_if_alone(family: str) -> None:
    model, inputs = model_of(family), batch(family)
    with compressed(model, DyCoke()):
        together = generate(model, inputs)
        for index in range(len(SAMPLES)):
            single = make_inputs(family, SAMPLES, only=index)
            alone = generate(model, single)
            n, own = inputs["input_ids"].shape[1], single["input_ids"].shape[1]
            assert torch.equal(together.sequences[index, n:], alone.sequences[0, own:])
            both = zip(together.logits, alone.logits, strict=True)
            assert max((a[index] - b[0]).abs().max() for a, b in both) < 1e-9


def test_without_a_cache_every_step_is_a_prefill_and_the_report_says_when_it_acts() -> None:
    model, inputs = model_of("llava_onevision"), batch("llava_onevision")
    with compressed(model, DyCoke()) as report:
        got = generate(model, inputs, use_cache=False)
        assert any("while decoding with a KV cache, layers from 1" in note for note in report.notes)
    with compressed(model, DyCoke(dynamic=False)):
        expected = generate(model, inputs, use_cache=False)
    assert torch.equal(torch.stack(got.logits), torch.stack(expected.logits))


def test_images_alone_and_text_are_left_as_they_are() -> None:
    family = "llava_onevision"
    model = model_of(family)
    inputs = batch(family, [Sample([Text(3), Image(4, 4), Text(5)]), Sample([Text(4)])])
    plain = generate(model, inputs)
    with compressed(model, DyCoke()):
        got = generate(model, inputs)
    assert torch.equal(torch.stack(got.logits), torch.stack(plain.logits))


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("chain", "match"),
    [
        ([DyCoke(), DyCoke()], "dycoke and dycoke both choose among cached tokens"),
        ([DyCoke(decode_layer=40)], r"decode_layer must be an integer in \[0, \d+\), got 40"),
        (
            [DyCoke(decode_layer=1), LVLMCSP(keep_ratio=0.5)],
            "reads the attention of decoder layer 1 while decoding, but of lvlm_csp",
        ),
    ],
)
def test_what_cannot_be_chosen_is_refused(chain: list[Any], match: str) -> None:
    with pytest.raises(ValueError, match=match), compressed(model_of("llava_onevision"), chain):
        pass
