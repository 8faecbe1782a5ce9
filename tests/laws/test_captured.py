"""A captured model gives what it gives without: what a tape can do, a CUDA graph can.

The tape runs recorded operations on the memory that they were recorded on, and no Python: whatever
was decided while recording (counts, places, branches) stands, and a value that it rested on would
be the first call's. So a second picture and text of a layout tell whether a graph would be right.
"""

from typing import Any

import pytest
import torch
from tests.laws.capturing import ONE, batches, check, generated, prefill, same, taped
from tests.laws.cases import GISTS, SAMPLES, VIDEO_CASES, VIDEO_SAMPLES, cases, make, model_of
from tests.laws.test_layout_cache import variants
from tests.tiny import build
from transformers import DynamicCache, StaticCache

from vispress import (
    capture,
    compressed,
    compression_report,
    prompt_lengths,
)
from vispress.errors import CompressionStateError, ConfigError, UnsupportedModelError
from vispress.runtime.kv_cache.hf_compat import CACHE


@pytest.mark.parametrize(("family", "method"), cases("captured"))
def test_prefills_have_the_bits_of_uncaptured_ones(family: str, method: str) -> None:
    model, inputs = model_of(family), batches(family, SAMPLES, int(method in GISTS))
    compressor = make(family, method)
    with compressed(model, compressor):
        expected = [prefill(model, given) for given in inputs]
        with taped(model) as captured:
            if why := compressor.uncapturable():
                assert same(prefill(model, inputs[0]), expected[0])
                assert captured.fallbacks == {f"{method}: {why}": 1}
            else:
                check(model, captured, inputs, expected)


@pytest.mark.some(cases=8)
@pytest.mark.parametrize(("family", "method"), VIDEO_CASES)
def test_so_have_those_of_videos(family: str, method: str) -> None:
    model, inputs, compressor = (
        model_of(family),
        batches(family, VIDEO_SAMPLES),
        make(family, method),
    )
    if compressor.uncapturable():
        return
    with compressed(model, compressor):
        expected = [prefill(model, given) for given in inputs]
        with taped(model) as captured:
            check(model, captured, inputs, expected)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "llava_next"])
def test_untouched_models_are_captured_too(family: str) -> None:
    model, inputs = model_of(family), batches(family, SAMPLES)
    expected = [prefill(model, given) for given in inputs]
    answers = [generated(model, given).sequences for given in inputs]
    with taped(model) as captured:
        check(model, captured, inputs, expected)
        for given, answer in zip(inputs, answers, strict=True):
            assert torch.equal(generated(model, given).sequences, answer)
        assert captured.report().steps == 6
        assert not captured.fallbacks


def test_a_text_of_an_untouched_model_is_captured_too() -> None:
    model, (inputs, _) = model_of("llava"), batches("llava", ONE)
    texts = [torch.full((1, 9), token) for token in (7, 8)]
    expected = [prefill(model, {"input_ids": text}) for text in texts]
    with taped(model) as captured:
        for text, wanted in zip(texts, expected, strict=True):
            assert same(prefill(model, {"input_ids": text}), wanted)
        prefill(model, inputs)
        assert captured.report().recorded == 2
        assert captured.report().prefills == 3


@pytest.mark.parametrize("method", ["divprune", "cmai", "prumerge"])  # one cannot be captured
def test_so_is_a_text_of_a_compressed_model(method: str) -> None:
    model, (inputs, _) = model_of("llava"), batches("llava", ONE)
    texts = [{"input_ids": torch.full((1, 9), token)} for token in (7, 8)]

    def talk() -> list[Any]:
        """A text, an answer to one, pictures behind one on its cache, and what is reported."""
        found: list[Any] = []
        for text in texts:
            found += [prefill(model, text), generated(model, text).sequences.tolist(), told()]
        cache = DynamicCache(config=model.config.text_config)
        found.append(prefill(model, texts[0], **{CACHE: cache}))
        mask = torch.ones(1, 9 + inputs["input_ids"].shape[1]).long()
        found.append(prefill(model, inputs | {"attention_mask": mask}, **{CACHE: cache}))
        return [*found, told()]

    def told() -> str:
        try:
            return str(compression_report(model).turns)
        except CompressionStateError as error:
            return str(error)

    with compressed(model, make("llava", method)):
        expected = talk()
        with taped(model) as captured:
            for one, wanted in zip(talk(), expected, strict=True):
                assert same(one, wanted) if isinstance(wanted, tuple) else one == wanted
            assert captured.report().prefills == 5, str(captured.report())
            generated(model, texts[0], prefill_chunk_size=4)
            assert any("in chunks" in why for why in captured.fallbacks), captured.fallbacks


REASONS: list[tuple[dict[str, Any], str]] = [
    ({"output_attentions": True}, "output_attentions"),
    ({"labels": True}, "labels"),
    ({"inputs_embeds": True}, "embeddings"),
    ({"prompt_lengths": [5]}, "prompt_lengths"),
]


@pytest.mark.parametrize(("more", "why"), REASONS)
def test_what_no_graph_has_runs_as_it_would_have(more: dict[str, Any], why: str) -> None:
    model, (inputs, _) = build("llava", attn="eager"), batches("llava", ONE)
    given = dict(inputs) | more
    if more.get("labels"):
        given["labels"] = inputs["input_ids"]
    if more.get("inputs_embeds"):
        given["inputs_embeds"] = model.get_input_embeddings()(given.pop("input_ids")).detach()
    with torch.no_grad(), compressed(model, "divprune", keep_ratio=0.5):
        expected = model(**given).logits
        with taped(model) as captured:
            assert torch.equal(model(**given).logits, expected)
            (found,) = captured.fallbacks
            assert why in found
            assert why in str(captured.report())


def test_training_and_gradients_run_as_they_would_have() -> None:
    model, (inputs, _) = build("llava"), batches("llava", ONE)
    with taped(model) as captured:
        model(**inputs).logits.sum().backward()
        assert model.lm_head.weight.grad is not None
        model.train()
        with torch.no_grad():
            model(**inputs)
        model.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(**inputs)
    assert [word for why in captured.fallbacks for word in ("gradients", "training", "autocast")
            if word in why] == ["gradients", "training", "autocast"]  # fmt: skip


@pytest.mark.slow
def test_compiled_layers_are_right() -> None:
    model, inputs = build("llava"), batches("llava", ONE)
    expected = [prefill(model, given) for given in inputs]
    for layer in model.model.language_model.layers:
        layer.compile(backend="eager")
    with taped(model) as captured:
        for given, wanted in zip(inputs, expected, strict=True):
            assert same(prefill(model, given), wanted)
        assert captured.report().prefills == 2


@pytest.mark.parametrize("method", ["fastv", "cdpruner"])
def test_layouts_are_not_taken_for_each_other(method: str) -> None:
    model = build("llava")
    calls = [given for given in variants() if not {"labels", "prompt_lengths"} & {*given}]
    with compressed(model, make("llava", method)):
        expected = [prefill(model, given, use_cache=True) for given in calls]
        with taped(model) as captured:
            for given, wanted in zip(calls * 2, expected * 2, strict=True):
                assert same(prefill(model, given, use_cache=True), wanted)
            assert captured.report().recorded == len(calls) - 1  # one is the first in other values


def test_told_prompts_are_not_taken_for_each_other() -> None:
    model, (inputs, _) = build("llava"), batches("llava", ONE)
    length = inputs["input_ids"].shape[1]
    with compressed(model, make("llava", "fastv")):

        def told(gone: int) -> Any:
            with prompt_lengths([length - gone]):
                return prefill(model, inputs)

        expected = [told(gone) for gone in (0, 3)]
        assert not same(*expected)
        with taped(model):
            assert all(
                same(told(gone), wanted) for gone, wanted in zip((0, 3), expected, strict=True)
            )


def test_capture_is_refused_by_name() -> None:
    model = build("llava")
    with pytest.raises(UnsupportedModelError, match="CUDA graphs need a CUDA device"):
        capture(model)
    with pytest.raises(ConfigError, match="max_graphs"):
        taped(model, max_graphs=0)
    with pytest.raises(ConfigError, match="bucket"):
        taped(model, bucket=1)
    with pytest.raises(ConfigError, match="prompt_bucket"):
        taped(model, prompt_bucket=0)
    with pytest.raises(ConfigError, match="backend must be"):
        capture(model, backend="cpu")  # type: ignore[arg-type]
    with taped(model), pytest.raises(CompressionStateError, match="captured already"):
        taped(model)
    model.lm_head.to("meta")
    with pytest.raises(UnsupportedModelError, match="one device, and this is on cpu, meta"):
        taped(model)


def test_static_caches_of_prefills_are_filled_as_they_would_be() -> None:
    model, inputs = model_of("llava"), batches("llava", ONE)

    def static() -> Any:
        return StaticCache(config=model.config.get_text_config(), max_cache_len=60)

    with compressed(model, make("llava", "fastv")):
        expected = [prefill(model, given, **{CACHE: static()}) for given in inputs]
        with taped(model) as captured:
            for given, wanted in zip(inputs, expected, strict=True):
                assert same(prefill(model, given, **{CACHE: static()}), wanted)
            assert captured.report().prefills == 2
