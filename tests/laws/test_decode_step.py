"""Steps of one token, which have a way of their own, give what a chunk of them does."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.laws.emulated_flash import emulating, running_flash
from tests.laws.table import make
from tests.tiny import Image, Sample, Text, Video, build, make_inputs
from torch import Tensor
from transformers import DynamicCache

from vispress import compressed
from vispress.runtime.forward.dynamic_decode import DynamicDecodeCall
from vispress.runtime.kv_cache.hf_compat import CACHE

LATER = 70
"""Steps: more than places are made for at once."""
ONE = [Sample([Text(5), Image(4, 4), Text(7)])]
PADDED = [Sample([Text(5), Image(4, 4), Text(9)]), Sample([Text(3), Image(4, 4), Text(4)])]
RAGGED = [
    Sample([Text(5), Image(4, 4), Text(9)]),
    Sample([Text(3), Image(4, 4), Image(4, 4), Text(4)]),
]
UNPADDED = [Sample([Text(5), Image(4, 4), Text(9)]), Sample([Text(50)])]
"""Of one length, without a mask, and shorter by what one image loses."""
VIDEOS = [Sample([Text(5), Video(4, 4, 4), Text(7)]), Sample([Text(3), Video(4, 4, 4), Text(2)])]
METHODS = ("divprune", "fastv", "pyramiddrop", "prumerge")


def words(batch: int, count: int) -> Tensor:
    return torch.randint(10, 60, (batch, count), generator=torch.Generator().manual_seed(3))


def behind(model: Any, turns: list[Any], ids: Tensor, *, alone: bool) -> Tensor:
    """Logits of words behind prompts on one cache, fed one by one or as a chunk."""
    cache, mask = DynamicCache(config=model.config.text_config), torch.ones(len(ids), 0).long()
    with torch.no_grad():
        for samples in turns:
            inputs = make_inputs("llava", samples, padding="left")
            mask = torch.cat([mask, inputs.pop("attention_mask")], dim=1)
            model(**inputs, attention_mask=mask, **places(mask, inputs["input_ids"], cache))
        logits = []
        for part in ids.split(1 if alone else ids.shape[1], dim=1):
            mask = torch.cat([mask, torch.ones_like(part)], dim=1)
            more = places(mask, part, cache)
            logits.append(model(input_ids=part, attention_mask=mask, **more).logits)
    return torch.cat(logits, dim=1)


def places(mask: Tensor, ids: Tensor, cache: Any) -> dict[str, Any]:
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return {"position_ids": positions, CACHE: cache}


def check(model: Any, turns: list[Any], method: str, count: int = 4, **options: Any) -> None:
    """Compare both ways; the steps must take the way of their own."""
    ids = words(len(turns[0]), count)
    with noting_steps() as taken, compressed(model, make("llava", method), **options):
        steps = behind(model, turns, ids, alone=True)
        assert len(taken) == count
        chunk = behind(model, turns, ids, alone=False)
        assert len(taken) == count
    assert (steps - chunk).abs().max() < 1e-9


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("method", METHODS)
def test_steps_equal_a_chunk(method: str, positions: Any) -> None:
    check(build("llava"), [PADDED], method, positions=positions)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_a_ragged_batch_hides_its_empty_slots(attn: str, positions: Any) -> None:
    for samples in (RAGGED, UNPADDED):
        check(build("llava", attn=attn), [samples], "fastv", positions=positions)


def test_flash_attention_is_shown_the_slots() -> None:
    model = build("llava")
    with emulating(), running_flash(model):
        for samples in (ONE, RAGGED, UNPADDED):
            check(model, [samples], "pyramiddrop")


@pytest.mark.parametrize("method", METHODS[:3])
def test_places_go_on_being_made(method: str) -> None:
    check(build("llava", layers=4), [PADDED], method, LATER)


def test_a_step_that_a_later_mask_hides_is_hidden() -> None:
    model, found = build("llava"), []
    inputs = make_inputs("llava", ONE)
    for general in (False, True):
        cache, mask = DynamicCache(config=model.config.text_config), inputs["attention_mask"]
        with torch.no_grad(), compressed(model, make("llava", "fastv")):
            model(**inputs, **{CACHE: cache})
            for word in words(1, 4).split(1, dim=1):
                mask = torch.cat([mask, torch.ones_like(word)], dim=1)
                if mask.shape[1] == inputs["input_ids"].shape[1] + 3:
                    mask[:, -2] = 0
                told = {"attention_mask": mask, "output_attentions": general, CACHE: cache}
                out = model(input_ids=word, **told)
        found.append(out.logits)
        assert cache.layers[-1].slots.positions[0, -4:].diff().tolist() == [1, 1, 1]
    assert torch.equal(*found)


@pytest.mark.parametrize("method", METHODS[:3])
def test_a_later_image_shifts_the_steps_behind_it(method: str) -> None:
    model = build("llava")
    with torch.no_grad(), compressed(model, make("llava", method), positions="compact"):
        cache = DynamicCache(config=model.config.text_config)
        whole = DynamicCache(config=model.config.text_config)
        mask = torch.ones(1, 0).long()
        for _ in range(2):
            inputs = make_inputs("llava", ONE)
            mask = torch.cat([mask, inputs.pop("attention_mask")], dim=1)
            told = places(mask, inputs["input_ids"], cache)
            model(**inputs, attention_mask=mask, **told)
            model(**inputs, attention_mask=mask, **told | {CACHE: whole})
            ids, logits = words(1, 3), []
            for at in range(3):
                mask = torch.cat([mask, torch.ones(1, 1).long()], dim=1)
                told = places(mask, ids[:, :1], cache)
                logits.append(
                    model(input_ids=ids[:, at : at + 1], attention_mask=mask, **told).logits
                )
            told = places(mask, ids, whole)
            chunk = model(input_ids=ids, attention_mask=mask, **told).logits
            assert (torch.cat(logits, dim=1) - chunk).abs().max() < 1e-9


def test_beams_take_their_shifts_along() -> None:
    model = build("llava")
    inputs = make_inputs("llava", PADDED, padding="left")
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "num_beams": 3}
    with compressed(model, make("llava", "divprune"), positions="compact"):
        cached = model.generate(**inputs, **options)
        assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))


CHOSEN = [
    ("cmai", "llava", [ONE], "sdpa"),
    ("cmai", "llava", [RAGGED, PADDED], "sdpa"),
    ("cmai", "llava", [RAGGED], "eager"),
    ("dycoke", "llava_onevision", [VIDEOS], "sdpa"),
    ("dycoke", "llava_onevision", [VIDEOS], "eager"),
]


@pytest.mark.parametrize(("method", "family", "turns", "attn"), CHOSEN)
def test_what_is_chosen_at_each_step_has_the_bits_of_the_general_way(
    method: str, family: str, turns: list[Any], attn: str
) -> None:
    model, found = build(family, attn=attn, dtype=torch.float32), []
    options: dict[str, Any] = {"mass": 0.6} if method == "cmai" else {"similarity": 1.0}
    with compressed(model, method, **options):
        for general in (False, True):
            cache, mask = DynamicCache(config=model.config.text_config), torch.ones(0)
            logits = []
            for samples in turns:
                inputs = make_inputs(family, samples, padding="left", dtype=torch.float32)
                own = inputs.pop("attention_mask")
                mask = torch.cat([mask, own], dim=1) if len(mask) else own
                told = places(mask, inputs["input_ids"], cache)
                with torch.no_grad():
                    model(**inputs, attention_mask=mask, **told)
                for word in words(len(mask), 4).split(1, dim=1):
                    mask = torch.cat([mask, torch.ones_like(word)], dim=1)
                    told = {"attention_mask": mask, **places(mask, word, cache)}
                    with torch.set_grad_enabled(general), noting_steps() as taken:
                        logits.append(model(input_ids=word, **told).logits.detach())
                    assert len(taken) == (not general)
                mask[:, -2] = 0  # what a later step does not see
            found.append(torch.cat(logits))
    assert torch.equal(*found)


@contextmanager
def noting_steps() -> Iterator[list[Any]]:
    """Collect the steps that take the way of their own."""
    taken, make_one = list[Any](), DynamicDecodeCall.make

    def noting(call: DynamicDecodeCall, kwargs: Any) -> Any:
        taken.append(call)
        return make_one(call, kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DynamicDecodeCall, "make", noting)
        yield taken


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_on_another_device_gets_its_tables_there(method: str) -> None:
    """As under accelerate's hooks that were put on behind `compress_model`: these run outside."""
    model = build("llava")
    inputs, last = make_inputs("llava", ONE), model.model.language_model.layers[-1]
    own, seen = last.forward, list[str]()

    def stub(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden.device.type != "meta":
            return own(hidden, *args, **kwargs)
        seen.extend(table.device.type for table in kwargs["position_embeddings"])
        return torch.zeros(hidden.shape, dtype=hidden.dtype)

    last.forward = stub
    ids, cache = words(1, 1), DynamicCache(config=model.config.text_config)
    with compressed(model, make("llava", method), positions="compact"), torch.no_grad():
        patched = last.forward

        @functools.wraps(patched)
        def elsewhere(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            return patched(hidden.to("meta") if hidden.shape[1] == 1 else hidden, *args, **kwargs)

        model(**inputs, **{CACHE: cache})
        last.forward = elsewhere
        mask = torch.ones(1, inputs["input_ids"].shape[1] + 1).long()
        model(input_ids=ids, attention_mask=mask, **places(mask, ids, cache))
    assert seen == ["meta", "meta"]
