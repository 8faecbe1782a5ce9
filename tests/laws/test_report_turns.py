"""Reports name the turn they tell of, and have the length of its conversation."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from tests.laws.cases import logits_of, make, model_of
from tests.tiny import Image, Sample, Text, build, make_inputs
from transformers import DynamicCache, StaticCache

from vispress import compress_model, compressed, compression_report, remove_compression
from vispress.adapters.base import find_adapter
from vispress.errors import CompressionStateError
from vispress.runtime.attachment import ATTRIBUTE
from vispress.runtime.kv_cache.cache_layers import kv_bytes
from vispress.runtime.kv_cache.hf_compat import CACHE

PROMPTS = (Sample([Text(5), Image(), Text(4)]), Sample([Text(2), Image(), Text(9)]))
FAMILIES = ("llava", "internvl")
METHODS = ("fastv", "divprune", "pyramiddrop")


def prompts(family: str, seed: int = 0) -> dict[str, Any]:
    return make_inputs(family, PROMPTS, padding="left", seed=seed)


def text(inputs: dict[str, Any], count: int, *, padded: int = 0) -> dict[str, Any]:
    """A turn of text behind what was fed; the first row has some padding in it."""
    ids = torch.randint(5, 90, (2, count), generator=torch.Generator().manual_seed(count))
    more = torch.ones_like(ids)
    more[0, :padded] = 0
    mask = torch.cat([inputs["attention_mask"], more], dim=1)
    return {"input_ids": ids, "attention_mask": mask}


def told(model: Any) -> tuple[int, int, int]:
    report = compression_report(model)
    return report.turn, report.turns, report.length


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_turn_is_of_the_conversation(family: str, method: str) -> None:
    model, inputs = model_of(family), prompts(family)
    length = inputs["input_ids"].shape[1]
    with compressed(model, make(family, method)) as view, torch.no_grad():
        cache: Any = DynamicCache()
        model(**inputs, **{CACHE: cache})
        first = compression_report(model)
        assert told(model) == (1, 1, length)
        assert "turn" not in str(first)
        second = text(inputs, 6, padded=2)
        model(**second, **{CACHE: cache})
        report = compression_report(model)
        assert told(model) == (1, 2, length + 6)
        assert f"turn 1 of 2, {length + 6} tokens in all" in str(report)
        assert report.samples == first.samples
        assert report.kv_bytes == kv_bytes(cache) > first.kv_bytes
        for layer in range(report.num_layers):
            alive = report.alive(layer)
            assert alive.shape == (2, length + 6)
            assert torch.equal(alive[:, :length], first.alive(layer))
            assert torch.equal(alive[:, length:], second["attention_mask"][:, length:].bool())
        # one token is not a turn: it counts from the next one on
        step = text(second, 1)
        model(**step, **{CACHE: cache})
        assert told(model) == (1, 2, length + 6)
        third = prompts(family, seed=1)
        mask = torch.cat([step["attention_mask"], third["attention_mask"]], dim=1)
        model(**third | {"attention_mask": mask}, **{CACHE: cache})
        assert told(model) == (3, 3, 2 * length + 7)
        assert compression_report(model).samples != report.samples
        assert compression_report(model).to_dict()["turns"] == 3
    assert view.turn == 3


def test_a_text_turn_in_a_conversation_of_its_own_has_no_report() -> None:
    model, inputs = model_of("llava"), prompts("llava")
    alone = make_inputs("llava", [Sample([Text(9)])])
    message = "last call was turn 1 of a conversation of 9 tokens, which holds no visual tokens"
    with compressed(model, "fastv", keep_ratio=0.5) as view:
        with pytest.raises(CompressionStateError, match="no report yet"):
            compression_report(model)
        logits_of(model, alone)
        with pytest.raises(CompressionStateError, match=message):
            compression_report(model)
        logits_of(model, inputs)
        assert told(model)[:2] == (1, 1)
        for more in ({}, {"use_cache": False}, {CACHE: DynamicCache()}):
            logits_of(model, inputs)
            logits_of(model, alone | more)
            with pytest.raises(CompressionStateError, match=message):
                compression_report(model)
    with pytest.raises(CompressionStateError, match=f"{message}; the block has ended"):
        _ = view.samples


def test_text_first_and_a_picture_later() -> None:
    model, inputs = model_of("llava"), prompts("llava")
    padded = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    start = {"input_ids": torch.randint(5, 90, (2, 4)), "attention_mask": padded}
    with compressed(model, "fastv", keep_ratio=0.5), torch.no_grad():
        cache: Any = DynamicCache()
        model(**start, **{CACHE: cache})
        with pytest.raises(CompressionStateError, match="turn 1 of a conversation of 4 tokens"):
            compression_report(model)
        mask = torch.cat([start["attention_mask"], inputs["attention_mask"]], dim=1)
        model(**inputs | {"attention_mask": mask}, **{CACHE: cache})
        assert told(model) == (2, 2, mask.shape[1])
        for layer in (0, 5):  # all of whose rows are stored, and a short one
            alive = compression_report(model).alive(layer)
            assert alive.shape == mask.shape
            assert torch.equal(alive[:, :4], padded.bool())


def test_two_conversations_by_turns() -> None:
    model, inputs = model_of("llava"), prompts("llava")
    length = inputs["input_ids"].shape[1]
    with compressed(model, "fastv", keep_ratio=0.5), torch.no_grad():
        one: Any = DynamicCache()
        two: Any = DynamicCache()
        model(**inputs, **{CACHE: one})
        second = prompts("llava", seed=1)
        model(**second, **{CACHE: two})
        model(**text(second, 3), **{CACHE: two})
        assert told(model) == (1, 2, length + 3)
        other = compression_report(model).samples
        model(**text(inputs, 4), **{CACHE: one})
        assert told(model) == (1, 2, length + 4)
        assert compression_report(model).samples != other
        # a prompt's cache that is copied for two questions
        copied = copy.deepcopy(one)
        model(**text(text(inputs, 4), 2), **{CACHE: copied})
        assert told(model) == (1, 3, length + 6)
        model(**text(text(inputs, 4), 3), **{CACHE: one})
        assert told(model) == (1, 3, length + 7)


@pytest.mark.slow
def test_an_account_keeps_no_cache_and_a_cache_no_model_alive() -> None:
    model, inputs = build("llava"), prompts("llava")
    compress_model(model, "fastv", keep_ratio=0.5)
    with torch.no_grad():
        cache: Any = DynamicCache()
        model(**inputs, **{CACHE: cache})
        model(**text(inputs, 3), **{CACHE: cache})
    seen, last = weakref.ref(cache), weakref.ref(model)
    kept = copy.deepcopy(cache)
    del cache
    gc.collect()
    assert seen() is None
    for _ in range(3):  # nor do turns whose caches are gone keep their prefills
        logits_of(model, inputs)
    assert len(find_adapter(model).base.__dict__[ATTRIBUTE].turns._records) == 2
    del model
    gc.collect()
    assert last() is None
    assert kept.get_seq_length()


def test_a_cache_goes_on_under_another_compression() -> None:
    model, inputs = model_of("llava"), prompts("llava")
    cache: Any = DynamicCache()
    with compressed(model, "fastv", keep_ratio=0.5), torch.no_grad():
        model(**inputs, **{CACHE: cache})
    with compressed(model, "divprune", keep_ratio=0.5), torch.no_grad():
        model(**text(inputs, 3), **{CACHE: cache})
        with pytest.raises(CompressionStateError, match=r"turn 2 .* those of a compression before"):
            compression_report(model)


@pytest.mark.parametrize("family", [*FAMILIES, "qwen2_5_vl"])
def test_a_generate_is_one_turn(family: str) -> None:
    model, inputs = build(family), prompts(family)
    length, greedy = inputs["input_ids"].shape[1], {"do_sample": False}
    greedy |= {"max_new_tokens": 4, "min_new_tokens": 4}
    with compressed(model, "fastv", keep_ratio=0.5):
        out = model.generate(**inputs, **greedy, return_dict_in_generate=True)
        cache = out.past_key_values
        assert told(model) == (1, 1, length)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 6).long()], dim=1)
        ids = torch.cat([out.sequences, torch.full((2, 2), 7)], dim=1)
        model.generate(input_ids=ids, attention_mask=mask, **greedy, **{CACHE: cache})
        assert told(model) == (1, 2, length + 4 + 2)
        # without a cache each step brings the pictures again
        model.generate(**inputs, **greedy, use_cache=False)
        assert told(model) == (1, 1, length + 3)
        model.generate(**inputs, **greedy)
        assert told(model) == (1, 1, length)


def test_drafts_are_no_turns() -> None:
    model = model_of("llava")
    inputs = make_inputs("llava", PROMPTS[:1])
    with compressed(model, "fastv", keep_ratio=0.5):
        model.generate(**inputs, max_new_tokens=5, do_sample=False, prompt_lookup_num_tokens=3)
        assert told(model)[:2] == (1, 1)


def test_a_static_cache_counts_too() -> None:
    model, inputs = model_of("llava"), prompts("llava")
    length = inputs["input_ids"].shape[1]
    with compressed(model, "fastv", keep_ratio=0.5), torch.no_grad():
        cache: Any = StaticCache(config=model.config.text_config, max_cache_len=length + 9)
        model(**inputs, **{CACHE: cache})
        model(**text(inputs, 3), **{CACHE: cache})
        model(**text(text(inputs, 3), 1), **{CACHE: cache})
        assert told(model) == (1, 2, length + 3)


def test_a_batch_that_changed_leaves_the_prefill_as_it_was() -> None:
    model, inputs = model_of("llava"), prompts("llava")
    with compressed(model, "fastv", keep_ratio=0.5), torch.no_grad():
        cache: Any = DynamicCache()
        model(**inputs, **{CACHE: cache})
        before = compression_report(model)
        cache.batch_select_indices(torch.tensor([1]))
        one = {key: value[1:] for key, value in text(inputs, 3).items()}
        model(**one, **{CACHE: cache})
        now = compression_report(model)
        assert (now.turn, now.turns, now.length) == (1, 2, before.length + 3)
        assert now.kv_bytes == kv_bytes(cache) < before.kv_bytes
        assert torch.equal(now.alive(5), before.alive(5))


def test_copies_keep_an_account_of_their_own() -> None:
    model, inputs = build("llava"), prompts("llava")
    compress_model(model, "fastv", keep_ratio=0.5)
    logits_of(model, inputs)
    twin = copy.deepcopy(model)
    with pytest.raises(CompressionStateError, match="no report yet"):
        compression_report(twin)
    logits_of(twin, make_inputs("llava", PROMPTS[:1]))
    assert len(compression_report(twin).samples) == 1
    assert len(compression_report(model).samples) == 2
    remove_compression(model)
