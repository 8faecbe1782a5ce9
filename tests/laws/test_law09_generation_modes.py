"""Law 9: greedy, sampling, beams, static caches, assisted decoding and second turns agree
with the oracle.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.families.glm import GLM
from tests.laws.cases import (
    CASES,
    DROPPING,
    FAMILIES,
    SAMPLES,
    Run,
    cases,
    encoding_as,
    inputs_of,
    make,
    model_of,
    real_positions,
    run,
)
from tests.laws.masked import masked_model, with_valid
from tests.laws.oracle import (
    extend,
    generate_positions,
    is_linear,
    language_model,
    oracle_expand,
    oracle_forward,
)
from tests.tiny import Image, Sample, Text, make_inputs
from transformers import DynamicCache, GenerationMixin, StaticCache

from vispress import (
    compress_model,
    compressed,
    compression_report,
    prompt_lengths,
    remove_compression,
)
from vispress.runtime.kv_cache.hf_compat import CACHE

METHODS = ["fastv", "divprune", "pyramiddrop", "visionzip"]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beams_returned": {"num_beams": 3, "num_return_sequences": 2},
    "beam_sampling": {"num_beams": 2, "do_sample": True},
    "static": {"cache_implementation": "static"},
    "static_beams": {"cache_implementation": "static", "num_beams": 2},
}


# transformers 5.17 repeats images one by one for beams ([A, A, B, B]) where samples repeat as
# [A, B, A, B]: with two images in a sample its own beams see the wrong ones. So does GLM's in 5.24
ORDERED = hasattr(GenerationMixin, "_expand_multimodal_outputs")


def new_cache(model: Any) -> DynamicCache:
    """A cache with the layers that the model has; none yet, where they all are alike."""
    hybrid = any(map(is_linear, language_model(model).layers))
    return DynamicCache(config=model.config.get_text_config()) if hybrid else DynamicCache()


def generate(model: Any, inputs: dict[str, Any], **mode: Any) -> Any:
    torch.manual_seed(7)
    return model.generate(
        **inputs, **({"do_sample": False} | mode), max_new_tokens=4, min_new_tokens=4,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip


@contextmanager
def as_masked(model: Any, result: Run, inputs: dict[str, Any]) -> Iterator[None]:
    """Inside, the untouched model masks what was dropped, and sees what was merged."""
    alive = oracle_of(result, inputs)
    with (
        encoding_as(model, result.encoded),
        masked_model(model, alive, result.positions, result.values),
    ):
        yield


def oracle_of(result: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    return with_valid(result.alive, inputs["attention_mask"].bool())


@pytest.mark.parametrize(("family", "method", "mode"), cases(9, DROPPING, turning=tuple(MODES)))
def test_mode_equals_the_masked_model(family: str, method: str, mode: str) -> None:
    model, inputs = model_of(family), inputs_of(family)
    if {"num_beams", "num_return_sequences"} & set(MODES[mode]) and (not ORDERED or family in GLM):
        inputs = make_inputs(family, [SAMPLES[0], SAMPLES[1]], padding="left")
    result = run(model, real_positions(family, inputs), make(family, method))
    with as_masked(model, result, inputs):
        plain = {k: v for k, v in MODES[mode].items() if k != "cache_implementation"}
        expected = generate(model, inputs, **plain)
    with compressed(model, make(family, method)):
        got = generate(model, inputs, **MODES[mode])
    assert torch.equal(got.sequences, expected.sequences)
    difference = torch.stack(got.logits, 1) - torch.stack(expected.logits, 1)
    assert difference.abs().max() < 1e-5


@pytest.mark.some(cases=8)
@pytest.mark.parametrize(
    ("family", "method"),
    cases(
        9,
        [
            (f, m)
            for f in FAMILIES
            for m in (
                "divprune",
                "fastv",
                "visionzip",
            )
        ],
    ),
)
def test_without_a_cache_every_step_equals_its_own_masked_forward(family: str, method: str) -> None:
    """Without a cache each step is a prefill, which decides by the prompt, as the first did."""
    model, inputs = model_of(family), inputs_of(family)
    with compressed(model, make(family, method)):
        got = generate(model, inputs, use_cache=False)
    start = inputs["input_ids"].shape[1]
    for step in range(4):
        grown = dict(inputs) | {"input_ids": got.sequences[:, : start + step]}
        ones = inputs["attention_mask"].new_ones(len(got.sequences), step)
        grown["attention_mask"] = torch.cat([inputs["attention_mask"], ones], dim=1)
        if "mm_token_type_ids" in grown:
            kinds = grown["mm_token_type_ids"]
            grown["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(ones).to(kinds)], dim=1)
        # as generate does; left to itself, forward counts padding in
        grown["position_ids"] = generate_positions(model, grown, start)
        with prompt_lengths(inputs["attention_mask"].sum(1)):
            result = run(model, grown, make(family, method))
        masked = oracle_forward(model, grown, result.alive, result.positions, result.values)
        last = oracle_expand(masked, result.alive[-1])[:, -1]
        assert (got.logits[step] - last).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_prompt_lookup_decoding_equals_greedy(family: str) -> None:
    model = model_of(family)
    inputs = make_inputs(family, [Sample([Text(6), Image(4, 4), Text(8)])])
    for method in ("fastv", "divprune"):
        with compressed(model, make(family, method)):
            greedy = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            lookup = model.generate(
                **inputs, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3
            )
        assert torch.equal(greedy, lookup)


@pytest.mark.parametrize(("family", "method"), cases("second turn", DROPPING))
def test_a_second_turn_of_text_continues_on_the_short_cache(family: str, method: str) -> None:
    model = model_of(family)
    inputs = inputs_of(family)
    result = run(model, real_positions(family, inputs), make(family, method))
    more = torch.randint(
        3, 100, (len(inputs["input_ids"]), 5), generator=torch.Generator().manual_seed(3)
    )

    def two_turns(cache: Any) -> tuple[Any, Any]:
        first = model.generate(
            **inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, **{CACHE: cache}
        )
        ids = torch.cat([first, more], dim=1)
        ones = torch.ones_like(ids[:, inputs["input_ids"].shape[1] :])
        mask = torch.cat([inputs["attention_mask"], ones], dim=1)
        extra = {}
        if "mm_token_type_ids" in inputs:
            kinds = inputs["mm_token_type_ids"]
            extra["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(ones).to(kinds)], dim=1)
        second = model.generate(
            input_ids=ids, attention_mask=mask, **{CACHE: cache}, max_new_tokens=3,
            min_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True,
            **extra,
        )  # fmt: skip
        return first, second

    with as_masked(model, result, inputs):
        expected = two_turns(new_cache(model))
    with compressed(model, make(family, method)):
        got = two_turns(cache := new_cache(model))
    assert torch.equal(got[1].sequences, expected[1].sequences)
    assert (torch.stack(got[1].logits) - torch.stack(expected[1].logits)).abs().max() < 1e-5
    # what the cache says is the full length; what it holds is not
    assert cache.get_seq_length() == got[1].sequences.shape[1] - 1
    attentions = [layer for layer in cache.layers if hasattr(layer, "keys")]
    whole = cache.get_seq_length()
    if not is_linear(language_model(model).layers[-1]):  # which may be all that is behind the last
        assert min(layer.keys.shape[2] for layer in attentions) < whole


# transformers itself cannot reuse a cache with a new image on M-RoPE models (its rope index fails)
@pytest.mark.parametrize("method", [*METHODS, "fastervlm"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision", "internvl"])
def test_a_second_turn_with_a_new_image_prunes_it_too(family: str, method: str) -> None:
    model = model_of(family)
    first = make_inputs(family, [Sample([Text(4), Image(4, 4), Text(5)])])
    second = make_inputs(family, [Sample([Text(3), Image(4, 6), Text(6)])], seed=5)
    ids = torch.cat([first["input_ids"], second["input_ids"]], dim=1)
    mask = torch.ones_like(ids)
    word = {"input_ids": ids[:, :1], "attention_mask": extend(mask, 1, fill=True)}
    with compressed(model, make(family, method)), torch.no_grad():
        cache = DynamicCache()
        model(**first, **{CACHE: cache})
        one = compression_report(model)
        got = model(**(second | {"attention_mask": mask}), **{CACHE: cache}).logits
        report = compression_report(model)
        step = model(**word, **{CACHE: cache}).logits
    n = first["input_ids"].shape[1]
    alive = [report.alive(i) for i in range(report.num_layers)]
    assert all(torch.equal(alive[i][:, :n], one.alive(i)) for i in range(report.num_layers))
    assert report.samples[0].images[0].num_kept < report.samples[0].images[0].num_visual
    if (
        method == "visionzip"
    ):  # values of both turns would have to be collected; rows are checked above
        return
    with (
        masked_model(model, [*alive, mask.bool()], make(family, method).default_positions),
        torch.no_grad(),
    ):
        full = DynamicCache()
        model(**first, **{CACHE: full})
        expected = model(**(second | {"attention_mask": mask}), **{CACHE: full}).logits
        behind = model(**word, **{CACHE: full}).logits
    expected = oracle_expand(expected, alive[-1][:, n:])
    assert (got - expected).abs().max() < 1e-5
    assert (step - behind).abs().max() < 1e-5


@pytest.mark.parametrize("method", ["fastv", "divprune"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision", "internvl"])
def test_an_image_after_a_turn_of_text_compresses_from_there(family: str, method: str) -> None:
    model = model_of(family)
    first = torch.randint(3, 100, (2, 6), generator=torch.Generator().manual_seed(1))
    pad = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    samples = [Sample([Text(3), Image(4, 6), Text(6)])] * 2
    second = make_inputs(family, samples, seed=5)
    mask = torch.cat([pad, second["attention_mask"]], dim=1)

    def two_turns() -> torch.Tensor:
        cache = DynamicCache()
        model(input_ids=first, attention_mask=pad, **{CACHE: cache})
        return model(**(second | {"attention_mask": mask}), **{CACHE: cache}).logits

    with torch.no_grad():
        with compressed(model, make(family, method)):
            got = two_turns()
            report = compression_report(model)
        alive = [report.alive(layer) for layer in range(report.num_layers)]
        with masked_model(model, [*alive, mask.bool()], make(family, method).default_positions):
            expected = two_turns()
    assert int(alive[-1].sum()) < int(mask.sum())
    assert (got - oracle_expand(expected, alive[-1][:, 6:])).abs().max() < 1e-5


# FlashVLM reads text before the image too, and of an earlier call only keys and values are left
@pytest.mark.some(cases=33)
@pytest.mark.parametrize(
    ("family", "method"),
    cases(
        9,
        [
            (family, method)
            for family, method in CASES
            if family in ("llava", "llava_next", "internvl") and method != "flashvlm"
        ],
    ),
)
def test_an_image_in_a_later_turn_keeps_what_one_prompt_would(family: str, method: str) -> None:
    """The oracle takes any choice: this holds what is read of a cache that has tokens to it."""
    model = model_of(family)
    first = torch.randint(3, 100, (1, 6), generator=torch.Generator().manual_seed(1))
    second = make_inputs(family, [Sample([Text(3), Image(4, 6), Text(6)])], seed=5)
    ids = torch.cat([first, second["input_ids"]], dim=1)
    mask = torch.ones_like(ids)

    def kept() -> list[list[tuple[int, ...]]]:
        (sample,) = compression_report(model).samples
        return [[place.kept for place in image.placements] for image in sample.images]

    with compressed(model, make(family, method)), torch.no_grad():
        cache = DynamicCache()
        model(input_ids=first, **{CACHE: cache})
        model(**(second | {"attention_mask": mask}), **{CACHE: cache})
        later = kept()
        model(**(second | {"input_ids": ids, "attention_mask": mask}))
        assert later == kept()


@pytest.mark.parametrize("method", METHODS)
def test_a_user_made_static_cache_is_allocated_short(method: str) -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    L = inputs["input_ids"].shape[1]
    with compressed(model, make("llava", method)):
        greedy = generate(model, inputs).sequences
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=L + 8)
        got = generate(model, inputs, **{CACHE: cache}).sequences
        report = compression_report(model)
    assert torch.equal(got, greedy)
    rows = int(report.alive(report.num_layers - 1).sum(1).max())
    assert cache.layers[-1].keys.shape[2] == L + 8 - (L - rows)


def test_crop_and_batch_operations_keep_the_cache_in_step() -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    cache = DynamicCache()
    with compressed(model, make("llava", "fastv")), torch.no_grad():
        model(**inputs, **{CACHE: cache})
        L = inputs["input_ids"].shape[1]
        step = torch.full((3, 2), 9)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(step)], dim=1)
        once = model(input_ids=step, attention_mask=mask, **{CACHE: cache}).logits
        cache.crop(-2)
        assert cache.get_seq_length() == L
        again = model(input_ids=step, attention_mask=mask, **{CACHE: cache}).logits
        assert torch.equal(once, again)
        cache.crop(-2)
        order = torch.tensor([2, 0, 0])
        cache.batch_select_indices(order)
        picked = model(input_ids=step, attention_mask=mask[order], **{CACHE: cache}).logits
        assert (picked - once[order]).abs().max() < 1e-9
        with pytest.raises(RuntimeError, match="cannot crop"):
            cache.crop(-(L - 2))


def test_a_compressed_cache_is_refused_by_an_uncompressed_model() -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    cache = DynamicCache()
    compress_model(model, "divprune", keep_ratio=0.5)
    with torch.no_grad():
        model(**inputs, **{CACHE: cache})
    remove_compression(model)
    mask = torch.ones(3, inputs["input_ids"].shape[1] + 1, dtype=torch.long)
    with torch.no_grad(), pytest.raises(RuntimeError, match="new cache"):
        model(input_ids=torch.full((3, 1), 9), attention_mask=mask, **{CACHE: cache})
