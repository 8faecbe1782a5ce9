"""A picture is compressed once, saved, and asked about as often as wanted."""

import inspect
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.laws.cases import logits_of, model_of
from tests.laws.test_gists import EXACT, hiding_model, last_seen
from tests.tiny import GIST, Image, Sample, Text, Video, build, gist_tokens, make_inputs
from transformers import DynamicCache

from vispress import compressed
from vispress.adapters.base import find_adapter
from vispress.errors import CompressionStateError, ConfigError
from vispress.methods import DivPrune, VoCo
from vispress.runtime.kv_cache.hf_compat import CACHE
from vispress.voco_cache import FORMAT, VoCoCache

THREE = ("llava", "qwen2_5_vl", "qwen3_vl")


@pytest.fixture(autouse=True)
def _gists() -> Iterator[None]:
    with gist_tokens(2):
        yield


def picture_and_question(family: str, seed: int = 0) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """A prompt up to its VoCo tokens, the ids of a question, and both in one."""
    whole = make_inputs(family, [Sample([Text(3), Image(4, 6), Text(5)])], seed=seed)
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    picture = {k: v[:, :-5] if k in names else v for k, v in whole.items()}
    return picture, whole["input_ids"][:, -5:], whole


@pytest.mark.parametrize("hide", ["visual", "prefix"])
@pytest.mark.parametrize("family", THREE)
def test_a_saved_picture_answers_as_the_masked_model(
    family: str, hide: str, tmp_path: Path
) -> None:
    """Loaded into the untouched model, by a forward and by `generate`."""
    model = model_of(family)
    picture, question, whole = picture_and_question(family)
    seen = last_seen(family, model, whole, hide)
    with hiding_model(model, seen, whole["attention_mask"]):
        expected = logits_of(model, whole)[:, -5:]
        answer = model.generate(**whole, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    with compressed(model, "voco", hide=hide):
        VoCoCache.compress(model, **picture).save(tmp_path / "picture.safetensors")
    cache = VoCoCache.load(tmp_path / "picture.safetensors", model)
    assert cache.voco_tokens == 2
    got = logits_of(model, cache.inputs_for(question))
    assert (got - expected).abs().max() < EXACT
    given = cache.inputs_for(question)
    told = model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(told[:, -4:], answer[:, -4:])
    with compressed(model, "voco", hide=hide):
        again = logits_of(model, cache.inputs_for(question))
    assert torch.equal(again, got)


@pytest.mark.parametrize("family", THREE)
def test_questions_of_one_batch_are_answered_as_alone(family: str) -> None:
    model = model_of(family)
    picture, question, _ = picture_and_question(family)
    with compressed(model, "voco"):
        cache = VoCoCache.compress(model, **picture)
    short = torch.tensor([[0, 0, 31, 32, 33]])
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    both = logits_of(model, cache.inputs_for(torch.cat([question, short]), mask))
    first = logits_of(model, cache.inputs_for(question))
    second = logits_of(model, cache.inputs_for(short[:, 2:]))
    assert (both[:1] - first).abs().max() < EXACT
    assert (both[1:, 2:] - second).abs().max() < EXACT


def test_its_size_is_that_of_its_tokens() -> None:
    """2 * layers * KV width * tokens * bytes: 0.524 MB for a token of LLaMA-7B in fp16."""
    model = build("llava", dtype=torch.float16)
    inputs = make_inputs("llava", [Sample([Image()])], dtype=torch.float16)
    with compressed(model, "voco"):
        cache = VoCoCache.compress(model, **inputs)
    text = model.config.get_text_config()
    width = text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    assert (cache.num_tokens, cache.voco_tokens) == (2, 2)
    assert cache.nbytes == 2 * text.num_hidden_layers * width * 2 * 2
    published = VoCoCache(
        keys=(torch.empty(32, 1, 128, dtype=torch.float16, device="meta"),) * 32,
        values=(torch.empty(32, 1, 128, dtype=torch.float16, device="meta"),) * 32,
        positions=torch.tensor([576]), next_position=577, voco_tokens=1, config_hash="",
    )  # fmt: skip
    assert published.nbytes == 524_288


def segments_of(family: str, sizes: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """Segments of one video, or pictures where the family has none."""
    parts = [Video(*size) if family != "llava" else Image() for size in sizes]
    return [make_inputs(family, [Sample([part])], seed=n) for n, part in enumerate(parts)]


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_5_vl"])
def test_segments_stand_behind_each_other_and_each_is_compressed_alone(family: str) -> None:
    model = model_of(family)
    segments = segments_of(family, [(2, 4, 4), (2, 4, 4), (2, 4, 4)])
    with compressed(model, "voco"):
        joined = VoCoCache.compress_segments(model, segments)
        start, alone = 0, []
        for segment in segments:
            alone.append(VoCoCache.compress(model, start=start, **segment))
            start += alone[-1].num_tokens
    row = joined.positions if joined.positions.ndim == 1 else joined.positions[0]
    voco = torch.stack([each.positions.view(-1, each.num_tokens)[0][-3:] for each in alone])
    assert joined.num_tokens == start == len(row)
    assert joined.voco_tokens == 6
    assert joined.next_position == int(row.max()) + 1
    assert bool((voco[1:] - voco[:-1] == alone[0].num_tokens).all())
    for layer in (0, 5):
        keys = torch.cat([each.keys[layer] for each in alone], dim=1)
        assert torch.equal(joined.keys[layer], keys)
    # by hand: what the untouched model has at these places, nothing of which is hidden yet
    for each, inputs, first in zip(alone, segments, (0, start // 3, 2 * start // 3), strict=True):
        plain, ids = DynamicCache(), torch.arange(inputs["input_ids"].shape[1])[None]
        if family != "llava":
            names = inspect.signature(model.model.get_rope_index).parameters
            given = {name: value for name, value in inputs.items() if name in names}
            ids = model.model.get_rope_index(**given)[0]
        with torch.no_grad():
            model(**inputs, position_ids=ids + first, **{CACHE: plain})
        assert (each.keys[5][:, -2:] - plain.layers[5].keys[0, :, -2:]).abs().max() < EXACT
    # plain attention over what the caches hold, at their positions
    question = torch.tensor([[31, 32, 33]])
    got = logits_of(model, joined.inputs_for(question))
    cache = DynamicCache()
    for layer in range(6):
        keys, values = (
            torch.cat([getattr(each, kind)[layer] for each in alone], dim=1)[None]
            for kind in ("keys", "values")
        )
        cache.update(keys, values, layer)
    ids = torch.arange(3)[None] + int(row.max()) + 1
    ids = ids if family == "llava" else ids.expand(3, -1, -1)
    with torch.no_grad():
        expected = model(input_ids=question, position_ids=ids, **{CACHE: cache}).logits
    assert (got - expected).abs().max() < EXACT


def test_a_shorter_segment_starts_later_so_that_its_tokens_stand_behind() -> None:
    model = model_of("qwen2_vl")
    with compressed(model, "voco"):
        joined = VoCoCache.compress_segments(
            model, segments_of("qwen2_vl", [(4, 6, 6), (1, 2, 2), (4, 6, 6)])
        )
    ids = joined.positions[0]
    places = ids.view(3, -1)[:, -2:].flatten()
    assert bool((places.diff() > 0).all())


def test_a_segment_sees_nothing_of_another() -> None:
    model = model_of("llava")
    one, two, other = segments_of("llava", [(1, 1, 1)] * 3)
    with compressed(model, "voco"):
        first = VoCoCache.compress_segments(model, [one, two])
        second = VoCoCache.compress_segments(model, [other, two])
    assert torch.equal(first.keys[5][:, 2:], second.keys[5][:, 2:])
    assert not torch.equal(first.keys[5][:, :2], second.keys[5][:, :2])


@pytest.mark.refusal
def test_what_is_no_picture_with_voco_tokens_is_refused() -> None:
    model = model_of("llava")
    picture, _, whole = picture_and_question("llava")
    with pytest.raises(CompressionStateError, match="not compressed"):
        VoCoCache.compress(model, **picture)
    with (
        compressed(model, "divprune", keep_ratio=0.5),
        pytest.raises(ConfigError, match="a method without VoCo tokens; use 'voco'"),
    ):
        VoCoCache.compress(model, **picture)
    padded = picture["attention_mask"].clone()
    padded[0, 0] = 0
    text = torch.tensor([[5, 6, GIST]])
    twice = {name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in picture.items()}
    with compressed(model, "voco"):
        with pytest.raises(ConfigError, match=r"ends with its VoCo tokens \(127\), got"):
            VoCoCache.compress(model, **whole)
        with pytest.raises(ConfigError, match="has padding"):
            VoCoCache.compress(model, **picture | {"attention_mask": padded})
        with pytest.raises(ConfigError, match="got 2 rows"):
            VoCoCache.compress(model, **twice)
        with pytest.raises(ConfigError, match="no image or video"):
            VoCoCache.compress(model, input_ids=text)
        with pytest.raises(ConfigError, match="none was given"):
            VoCoCache.compress_segments(model, [])
    with (
        compressed(model, [DivPrune(keep_ratio=0.5), VoCo()], positions="compact"),
        pytest.raises(ConfigError, match="renumbers positions"),
    ):
        VoCoCache.compress(model, **picture)


@pytest.mark.refusal
def test_files_of_other_models_and_other_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, path = model_of("llava"), tmp_path / "picture.safetensors"
    with compressed(model, "voco"):
        cache = VoCoCache.compress(model, **picture_and_question("llava")[0])
    cache.save(path)
    with pytest.raises(ConfigError, match="was made by a model of another config"):
        VoCoCache.load(path, model_of("qwen2_5_vl"))
    other = replace(cache, config_hash="other")
    with pytest.raises(ConfigError, match="were made by models of other configs"):
        VoCoCache.concatenate([cache, other])
    (tmp_path / "pickle").write_bytes(b"\x80\x04N.")
    with pytest.raises(ConfigError, match="as a safetensors file"):
        VoCoCache.load(tmp_path / "pickle", model)
    with pytest.raises(ConfigError, match="cannot read"):
        VoCoCache.load(tmp_path / "nowhere", model)
    with pytest.raises(ConfigError, match="cannot write"):
        cache.save(tmp_path / "nowhere" / "picture")
    replace(cache, positions=cache.positions[1:]).save(tmp_path / "damaged")
    with pytest.raises(ConfigError, match="does not hold 5 tokens in 6 layers"):
        VoCoCache.load(tmp_path / "damaged", model)
    for change in ({"next_position": "far"}, {"voco_tokens": None}):
        whole = {"format": FORMAT, "tokens": "5", "config_sha256": cache.config_hash}
        whole |= {"next_position": "9", "voco_tokens": "2"} | change
        card = {name: value for name, value in whole.items() if value is not None}
        save_file(load_file(path), tmp_path / "counts", metadata=card)
        with pytest.raises(ConfigError, match="does not hold 5 tokens"):
            VoCoCache.load(tmp_path / "counts", model)
    for ids in (torch.tensor([5, 6]), [[5, 6]], torch.zeros(1, 0, dtype=torch.long)):
        with pytest.raises(ConfigError, match=r"must be a tensor \[R, Q\] of questions"):
            cache.inputs_for(ids)
    inputs = dict(picture_and_question("qwen2_5_vl")[0])
    del inputs["mm_token_type_ids"]
    with (
        compressed(model_of("qwen2_5_vl"), "voco"),
        pytest.raises(ConfigError, match="mm_token_type_ids are missing"),
    ):
        VoCoCache.compress(model_of("qwen2_5_vl"), **inputs)
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ConfigError, match=r"format must be 'vispress.voco_cache.1', got None"):
        VoCoCache.load(tmp_path / "other", model)
    assert not list(tmp_path.glob(".saving*"))


def test_a_loaded_cache_has_the_dtype_of_its_model(tmp_path: Path) -> None:
    model, half = model_of("llava"), model_of("llava", torch.bfloat16)
    with compressed(model, "voco"):
        VoCoCache.compress(model, **picture_and_question("llava")[0]).save(tmp_path / "picture")
    found = VoCoCache.load(tmp_path / "picture", half)
    assert {x.dtype for x in (*found.keys, *found.values)} == {torch.bfloat16}
    assert find_adapter(half).base.dtype == torch.bfloat16
