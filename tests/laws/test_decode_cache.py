"""The decode stage and its cache: several tokens at once, what is taken back, turns, new videos."""

from typing import Any

import pytest
import torch
from tests.laws.cases import make, model_of, real_positions
from tests.laws.test_decode_stage import SAMPLES, assert_same, batch, generate, oracle
from tests.laws.test_flash import flash as flash
from tests.tiny import Sample, Text, Video, build, make_inputs
from transformers import DynamicCache

from vispress import compressed
from vispress.errors import UnsupportedModelError
from vispress.methods import DyCoke
from vispress.runtime.kv_cache.hf_compat import CACHE
from vispress.runtime.kv_cache.slots import Slots


def tokens_of(count: int) -> torch.Tensor:
    return torch.randint(3, 100, (3, count), generator=torch.Generator().manual_seed(3))


def positions(model: Any, mask: torch.Tensor, count: int) -> torch.Tensor:
    """Position ids of the last tokens; M-RoPE models cannot go on by themselves."""
    ids = (mask.cumsum(-1) - 1).clamp(min=0)[:, -count:]
    return ids.expand(3, -1, -1) if hasattr(model.model, "rope_deltas") else ids


def feed(
    model: Any,
    inputs: dict[str, Any],
    cache: Any,
    fed: list[torch.Tensor],
    real: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits of chunks of text behind a prefill; `real` is the mask of the first, else ones."""
    mask, found = inputs["attention_mask"], []
    for chunk in fed:
        own = torch.ones_like(chunk) if real is None or found else real
        mask = torch.cat([mask, own], dim=1)
        ids = positions(model, mask, chunk.shape[1])
        given = {"attention_mask": mask, "position_ids": ids, CACHE: cache}
        with torch.no_grad():
            found.append(model(input_ids=chunk, **given).logits)
    return torch.cat(found, dim=1)


def choices(cache: Any) -> list[Any]:
    """What decoding has chosen so far, of the layers that hold it."""
    found = [getattr(layer, "selection", None) for layer in cache.layers]
    assert any(each is not None for each in found)
    return [each for each in found if each is not None]


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
        never = DynamicCache()
        model(**inputs, **{CACHE: never})
        feed(model, inputs, never, [more[:, :2]])
        for got, expected in zip(choices(caches[2]), choices(never), strict=True):
            torch.testing.assert_close(got.attention, expected.attention)
            assert torch.equal(got.selected, expected.selected)
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


@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_padding_in_a_second_turn_is_no_step(family: str, place: int) -> None:
    """In front of its words and behind them: what is chosen is what the sample alone chooses."""
    model, inputs, words = model_of(family), batch(family), tokens_of(5)
    real, token = torch.ones_like(words), tokens_of(6)[:, 5:]
    real[0, place : place + 2] = 0
    alone, own = make_inputs(family, SAMPLES, only=0), words[:1, real[0].bool()]
    with compressed(model, DyCoke(similarity=0.5)), torch.no_grad():
        caches = [DynamicCache(), DynamicCache()]
        for given, cache in zip((inputs, alone), caches, strict=True):
            model(**real_positions(family, given), **{CACHE: cache})
        together = feed(model, inputs, caches[0], [words, token], real)
        expected = feed(model, alone, caches[1], [own, token[:1]])
        (got,), (chosen,) = map(choices, caches)
    assert (together[0, -1] - expected[0, -1]).abs().max() < 1e-9
    assert int(got.selected[0].sum()) == int(chosen.selected.sum()) < int(chosen.visual.sum())


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
            held = cache.layers[0].selection
            if held is not None:
                assert not held.begun.any()
                kept = [len(image.kept) for s in report.samples for image in s.images]
                before = int(held.visual[:, : one.shape[1]].sum())
                assert int(held.visual.sum()) == before + sum(kept)
                assert int(held.num_keep) == int(before * (1 - 0.7)) + int(sum(kept) * (1 - 0.7))
                more = torch.cat([two, torch.ones_like(step)], dim=1)
                model(input_ids=step, attention_mask=more, **{CACHE: cache})
                held = cache.layers[0].selection
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


# all layers short; some, of which transformers' own stand in front; rows that come back behind
@pytest.mark.parametrize("method", ["dycoke", "fastv", "lvlm_csp"])
def test_a_reset_cache_starts_anew(method: str) -> None:
    model, inputs = model_of("llava_onevision"), batch("llava_onevision")
    with compressed(model, make("llava_onevision", method)):
        fresh = generate(model, inputs)
        cache = DynamicCache()
        generate(model, inputs, **{CACHE: cache})
        cache.reset()
        assert_same(generate(model, inputs, **{CACHE: cache}), fresh)


def test_slots_that_two_caches_share_are_selected_by_each_ones_index() -> None:
    """Layers that share slots share the selection too, made by the same index alone."""
    slots = Slots(torch.arange(6).view(2, 3), None, None, 3)
    turned, first = torch.tensor([1, 0]), torch.tensor([0, 0])
    assert slots.select(turned) is slots.select(turned)
    assert slots.select(turned).positions.tolist() == [[3, 4, 5], [0, 1, 2]]
    assert slots.select(first).positions.tolist() == [[0, 1, 2], [0, 1, 2]]
