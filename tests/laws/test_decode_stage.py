"""Laws 1, 4, 7 and 9 for the decode stage: every step equals the model masked as the rule says."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.laws.cases import VIDEO, model_of, real_positions, run
from tests.laws.decoding import Stepping, stepping
from tests.laws.masked import masked_model
from tests.laws.test_flash import flash as flash
from tests.laws.test_law09_generation_modes import MODES, oracle_of
from tests.tiny import Image, Sample, Text, Video, build, make_inputs
from transformers import DynamicCache

from vispress import compressed
from vispress.errors import UnsupportedModelError
from vispress.methods import LVLMCSP, DyCoke, FastV
from vispress.runtime.cache_name import CACHE

# two lengths, a second video in one sample, an image beside it, one sample of text alone
SAMPLES = [
    Sample([Text(3), Video(3, 4, 4), Text(6)]),
    Sample([Text(2), Video(3, 4, 6), Text(3), Video(3, 4, 4), Text(4), Image(4, 4), Text(2)]),
    Sample([Text(7)]),
]
NEW = 7
OPTIONS: dict[str, dict[str, Any]] = {
    "published": {},
    "budget": {"keep_ratio": 0.4},
    "often": {"similarity": 0.999},
    "seldom": {"similarity": 0.5},
    "quirks": {"similarity": 0.5, "reference_quirks": True},
    "first_layer": {"decode_layer": 0, "keep_ratio": 0.6},
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


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "greedy"])
@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_mode_equals_the_masked_model(family: str, mode: str) -> None:
    model, inputs, method = model_of(family), batch(family), DyCoke(similarity=0.5)
    with oracle(family, method, inputs):
        plain = {k: v for k, v in MODES[mode].items() if k != "cache_implementation"}
        expected = generate(model, inputs, **plain)
    with compressed(model, method):
        assert_same(generate(model, inputs, **MODES[mode]), expected)


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


def tokens_of(count: int) -> torch.Tensor:
    return torch.randint(3, 100, (3, count), generator=torch.Generator().manual_seed(3))


def positions(model: Any, mask: torch.Tensor, count: int) -> torch.Tensor:
    """Position ids of the last tokens; M-RoPE models cannot go on by themselves."""
    ids = (mask.cumsum(-1) - 1).clamp(min=0)[:, -count:]
    return ids.expand(3, -1, -1) if hasattr(model.model, "rope_deltas") else ids


def feed(model: Any, inputs: dict[str, Any], cache: Any, fed: list[torch.Tensor]) -> torch.Tensor:
    """Logits of chunks of text behind a prefill."""
    mask, found = inputs["attention_mask"], []
    for chunk in fed:
        mask = torch.cat([mask, torch.ones_like(chunk)], dim=1)
        ids = positions(model, mask, chunk.shape[1])
        given = {"attention_mask": mask, "position_ids": ids, CACHE: cache}
        with torch.no_grad():
            found.append(model(input_ids=chunk, **given).logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_several_tokens_at_once_are_as_many_steps_and_can_be_taken_back(family: str) -> None:
    model, inputs, more = model_of(family), batch(family), tokens_of(6)
    with compressed(model, DyCoke(similarity=0.97)), torch.no_grad():
        caches = [DynamicCache() for _ in range(3)]
        for cache in caches:
            model(**inputs, **{CACHE: cache})
        one_by_one = feed(model, inputs, caches[0], list(more.split(1, dim=1)))
        at_once = feed(model, inputs, caches[1], [more[:, :2], more[:, 2:]])
        assert (one_by_one - at_once).abs().max() < 1e-9
        # rejected candidates leave no trace
        wrong = torch.cat([more[:, :2], tokens_of(9)[:, 6:]], dim=1)
        feed(model, inputs, caches[2], [wrong])
        caches[2].crop(-3)
        longer = inputs | {
            "attention_mask": torch.cat(
                [inputs["attention_mask"], torch.ones_like(more[:, :2])], dim=1
            )
        }
        again = feed(model, longer, caches[2], [more[:, 2:]])
        assert (again - one_by_one[:, 2:]).abs().max() < 1e-9
        with pytest.raises(RuntimeError, match="known before the last 4 only"):
            caches[2].crop(-5)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_prompt_lookup_decoding_equals_greedy(family: str) -> None:
    model, inputs = model_of(family), make_inputs(family, SAMPLES[:1])
    with compressed(model, DyCoke(similarity=0.97)):
        greedy = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        lookup = model.generate(
            **inputs, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3
        )
    assert torch.equal(greedy, lookup)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_a_second_turn_of_text_goes_on_choosing(family: str) -> None:
    model, inputs, more = model_of(family), batch(family), tokens_of(5)
    method = DyCoke(similarity=0.97)

    def two_turns() -> torch.Tensor:
        cache = DynamicCache()
        with torch.no_grad():
            model(**real_positions(family, inputs), **{CACHE: cache})
        return feed(model, inputs, cache, [more])

    with oracle(family, method, inputs):
        expected = two_turns()
    with compressed(model, method):
        assert (two_turns() - expected).abs().max() < 1e-5


def test_a_new_video_is_a_prefill_that_sees_all_and_joins_the_choice() -> None:
    family = "llava_onevision"
    model = model_of(family)
    first = make_inputs(family, [Sample([Text(4), Video(3), Text(5)])])
    second = make_inputs(family, [Sample([Text(3), Video(2), Text(6)])], seed=5)
    step = torch.full((1, 1), 9)
    one = torch.ones_like(first["input_ids"])
    two = torch.cat([one, torch.ones_like(step), torch.ones_like(second["input_ids"])], dim=1)

    def turns(method: DyCoke) -> tuple[Any, torch.Tensor]:
        cache = DynamicCache()
        with compressed(model, method) as report, torch.no_grad():
            model(**first, **{CACHE: cache})
            model(input_ids=step, attention_mask=two[:, : one.shape[1] + 1], **{CACHE: cache})
            logits = model(**(second | {"attention_mask": two}), **{CACHE: cache}).logits
            held = cache.layers[1].selection
            if held is not None:
                assert not held.begun.any()
                kept = [len(image.kept) for s in report.samples for image in s.images]
                before = int(held.visual[:, : one.shape[1]].sum())
                assert int(held.visual.sum()) == before + sum(kept)
                assert int(held.num_keep) == int(before * (1 - 0.7)) + int(sum(kept) * (1 - 0.7))
                more = torch.cat([two, torch.ones_like(step)], dim=1)
                model(input_ids=step, attention_mask=more, **{CACHE: cache})
                held = cache.layers[1].selection
                assert held.begun.all()
                assert int(held.selected.sum()) == int(held.num_keep)
        return held, logits

    held, logits = turns(DyCoke(decode_pruned=0.7))
    assert held is not None
    none, plain = turns(DyCoke(dynamic=False))
    assert none is None
    assert logits.shape == plain.shape


def test_nothing_is_removed_from_the_cache() -> None:
    model, inputs = model_of("llava_onevision"), batch("llava_onevision")
    shapes = []
    for dynamic in (True, False):
        cache = DynamicCache()
        with compressed(model, DyCoke(dynamic=dynamic)) as report:
            generate(model, inputs, **{CACHE: cache})
            shapes.append(([layer.keys.shape for layer in cache.layers], report.kv_bytes))
    assert shapes[0] == shapes[1]


def test_without_a_cache_every_step_is_a_prefill_and_the_report_says_when_it_acts() -> None:
    model, inputs = model_of("llava_onevision"), batch("llava_onevision")
    with compressed(model, DyCoke()) as report:
        got = generate(model, inputs, use_cache=False)
        assert any("while decoding with a KV cache, layers from 2" in note for note in report.notes)
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


@pytest.mark.usefixtures("flash")
def test_flash_masks_give_what_sdpa_gives() -> None:
    model, inputs = build("llava_onevision"), batch("llava_onevision", dtype=torch.float32)
    config, found = model.model.language_model.config, []
    with compressed(model, DyCoke()):
        for implementation in ("sdpa", "flash_emulated"):
            config._attn_implementation = implementation
            found.append(generate(model, inputs))
        assert torch.equal(found[0].sequences, found[1].sequences)
        cache, step = DynamicCache(), tokens_of(2)
        with torch.no_grad():
            model(**inputs, **{CACHE: cache})
        with pytest.raises(UnsupportedModelError, match="FlashAttention has one mask for all"):
            feed(model, inputs, cache, [step])


def test_a_reset_cache_starts_anew() -> None:
    model, inputs = model_of("llava_onevision"), batch("llava_onevision")
    with compressed(model, DyCoke()):
        fresh = generate(model, inputs)
        cache = DynamicCache()
        generate(model, inputs, **{CACHE: cache})
        cache.reset()
        assert_same(generate(model, inputs, **{CACHE: cache}), fresh)


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
