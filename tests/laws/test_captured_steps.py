"""Decode steps of a captured model: what they give, and where a conversation's cache lives."""

import copy
from typing import Any

import pytest
import torch
from tests.laws.capturing import (
    ONE,
    batches,
    begun,
    generated,
    longer,
    step,
    stored,
    taped,
)
from tests.laws.cases import GISTS, SAMPLES, cases, make, model_of
from torch import Tensor

from vispress import (
    compress_model,
    compressed,
    remove_compression,
)
from vispress.runtime.graphs.lodging import lodging_of
from vispress.runtime.kv_cache.hf_compat import CACHE


@pytest.mark.parametrize(("family", "method"), cases("captured answers"))
def test_answers_are_those_of_uncaptured_models(family: str, method: str) -> None:
    model, inputs = model_of(family), batches(family, SAMPLES, int(method in GISTS))
    compressor = make(family, method)
    with compressed(model, compressor):
        expected = [generated(model, given) for given in inputs]
        with taped(model) as captured:
            for given, wanted in zip(inputs, expected, strict=True):
                found = generated(model, given)
                assert torch.equal(found.sequences, wanted.sequences)
                for a, b in zip(found.logits, wanted.logits, strict=True):
                    assert (a - b).abs().max() < 1e-9
            report = captured.report()
        assert report.steps == 6 or any("at each step" in why for why in report.fallbacks)


@pytest.mark.parametrize("method", [None, "divprune", "fastv", "pyramiddrop"])
def test_steps_on_a_static_cache_have_the_bits_of_uncaptured_ones(method: str | None) -> None:
    model, inputs = model_of("llava"), batches("llava", SAMPLES)
    if method:
        compress_model(model, make("llava", method))
    try:
        expected = [generated(model, given, cache_implementation="static") for given in inputs]
        with taped(model) as captured:
            for given, wanted in zip(inputs, expected, strict=True):
                found = generated(model, given, cache_implementation="static")
                assert torch.equal(torch.stack(found.logits), torch.stack(wanted.logits))
            assert captured.report().steps == 6, str(captured.report())
    finally:
        if method:
            remove_compression(model)


@pytest.mark.parametrize("method", ["fastv", "divprune"])
def test_conversations_take_turns_in_one_graph(method: str) -> None:
    model, inputs = model_of("llava"), batches("llava", ONE)
    with compressed(model, make("llava", method)):

        def talk() -> list[Tensor]:
            caches, masks = zip(*(begun(model, given) for given in inputs), strict=True)
            found = []
            for token in range(3):
                masks = tuple(map(longer, masks))
                for cache, mask in zip(caches, masks, strict=True):
                    found.append(step(model, cache, mask, 9 + token))
            return [*found, *stored(caches[0]), *stored(caches[1])]

        expected = talk()
        with taped(model) as captured:
            found = talk()
            assert captured.report().recorded == 2
        assert all((a - b).abs().max() < 1e-9 for a, b in zip(found, expected, strict=True))


def test_a_cache_moves_out_for_whoever_reads_it() -> None:
    model, (inputs, _) = model_of("llava"), batches("llava", ONE)
    with compressed(model, make("llava", "fastv")):

        def talk(look: Any) -> list[Tensor]:
            cache, mask = begun(model, inputs)
            found = []
            for _ in range(2):
                mask = longer(mask)
                found.append(step(model, cache, mask))
            cache = look(cache)
            assert lodging_of(cache) is None
            found.append(step(model, cache, longer(mask)))
            more = longer(mask, 3)
            with torch.no_grad():
                ids = torch.full((1, 2), 5)
                found.append(model(input_ids=ids, attention_mask=more, **{CACHE: cache}).logits)
            return found

        def cropped(cache: Any) -> Any:
            cache.crop(-1)
            return step_again(cache)

        def step_again(cache: Any) -> Any:
            step(model, cache, inputs["attention_mask"].new_ones(1, 2 + length))
            cache.layers[0].keys  # noqa: B018  (reads it)
            return cache

        def batch_moved(cache: Any) -> Any:
            cache.reorder_cache(torch.tensor([0]))
            return cache

        length = inputs["input_ids"].shape[1]
        for look in (copy.deepcopy, cropped, batch_moved):
            expected = talk(look)
            with taped(model) as captured:
                found = talk(look)
                assert captured.report().steps >= 3
            assert all((a - b).abs().max() < 1e-9 for a, b in zip(found, expected, strict=True))


def test_a_lodged_cache_tells_its_length_and_stays() -> None:
    model, (inputs, _) = model_of("llava"), batches("llava", ONE)
    with compressed(model, make("llava", "fastv")), taped(model):
        cache, mask = begun(model, inputs)
        step(model, cache, longer(mask))
        assert cache.get_seq_length() == mask.shape[1] + 1
        assert cache.get_mask_sizes(1, 0) == (mask.shape[1] + 2, 0)
        assert lodging_of(cache) is not None
        assert cache.layers[-1].keys.shape[2] < mask.shape[1]
        assert lodging_of(cache) is None


def test_an_answer_outgrows_its_bucket_and_moves_on() -> None:
    model, (inputs, _) = model_of("llava"), batches("llava", ONE)
    with compressed(model, make("llava", "fastv")):
        options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
        expected = model.generate(**inputs, **options)
        with taped(model, bucket=16) as captured:
            assert torch.equal(model.generate(**inputs, **options), expected)
            assert captured.report().recorded >= 3
            assert captured.report().steps == 19


def test_beams_run_and_are_left_alone_soon() -> None:
    model, (inputs, _) = model_of("llava"), batches("llava", ONE)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": 3}
    with compressed(model, make("llava", "fastv")):
        expected = model.generate(**inputs, **options)
        with taped(model) as captured:
            assert torch.equal(model.generate(**inputs, **options), expected)
        assert any("between steps" in why for why in captured.fallbacks)


def test_what_a_conversation_leaves_in_a_graph_harms_no_other() -> None:
    model, inputs = model_of("llava"), batches("llava", ONE)
    cache, mask = begun(model, inputs[1])
    expected = step(model, cache, longer(mask))
    with taped(model):
        for given in inputs:
            cache, mask = begun(model, given)
            if given is inputs[0]:
                for layer in cache.layers:
                    layer.values = torch.cat([layer.values, layer.values * torch.nan], dim=2)
                    layer.keys = torch.cat([layer.keys, layer.keys], dim=2)
                mask = torch.cat([mask, mask], dim=1)
            found = step(model, cache, longer(mask))
        assert (found - expected).abs().max() < 1e-9
