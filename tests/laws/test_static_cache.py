"""Law 9 for static caches that are allocated short: empty slots, rows that move, `reset`."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.laws.cases import inputs_of, make, model_of
from tests.laws.test_decode_stage import assert_same
from tests.laws.test_law09_generation_modes import METHODS, generate
from torch import Tensor
from transformers import DynamicCache, StaticCache

from vispress import compressed
from vispress.runtime.forward.static_decode import StaticDecodeCall
from vispress.runtime.kv_cache.hf_compat import CACHE


def static(model: Any, inputs: dict[str, Any]) -> Any:
    """With as many slots as a prompt and an answer of four tokens take."""
    length = inputs["input_ids"].shape[1] + 4
    return StaticCache(config=model.config.get_text_config(), max_cache_len=length)


@pytest.mark.parametrize("method", METHODS)
def test_eager_attention_does_not_see_slots_in_which_nothing_is_stored(method: str) -> None:
    model = model_of("llava", torch.float32, "eager")
    inputs = inputs_of("llava", "left", torch.float32)
    with compressed(model, make("llava", method)):
        expected = generate(model, inputs)
        got = generate(model, inputs, **{CACHE: static(model, inputs)})
    assert torch.equal(got.sequences, expected.sequences)
    assert (torch.stack(got.logits) - torch.stack(expected.logits)).abs().max() < 1e-3


def test_rows_that_change_places_take_their_padding_along() -> None:
    model, inputs, order = model_of("llava"), inputs_of("llava"), torch.tensor([2, 0, 1])
    token = torch.full((3, 1), 9)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(token)], dim=1)

    def step(cache: Any, rows: Tensor) -> Tensor:
        given = {"attention_mask": mask[rows], CACHE: cache}
        return model(input_ids=token, **given).logits  # type: ignore[no-any-return]

    with compressed(model, make("llava", "fastv")), torch.no_grad():
        caches = static(model, inputs), static(model, inputs)
        for cache in caches:
            model(**inputs, **{CACHE: cache})
        expected = step(caches[0], torch.arange(3))
        caches[1].reorder_cache(order)
        assert (step(caches[1], order) - expected[order]).abs().max() < 1e-9


def test_a_reset_cache_takes_as_many_tokens_as_before() -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    cache = static(model, inputs)
    with compressed(model, make("llava", "fastv")):
        expected = generate(model, inputs, **{CACHE: cache})
        sizes = [layer.keys.shape[2] for layer in cache.layers]
        cache.reset()
        assert_same(generate(model, inputs, **{CACHE: cache}), expected)
        assert [layer.keys.shape[2] for layer in cache.layers] == sizes


def test_a_layer_on_another_device_gets_ids_and_mask_that_are_there() -> None:
    """`meta` stands for the device of a later layer in a sharded model."""
    there = torch.device("meta")
    plan: Any = SimpleNamespace(
        rotary=lambda number, hidden, ids: (ids, ids), implementation="sdpa"
    )
    call = StaticDecodeCall(plan, (), DynamicCache(), torch.tensor([[7]]))
    shift = torch.tensor([3], device=there)
    slots = torch.zeros(1, 5, dtype=torch.long, device=there)
    held: Any = SimpleNamespace(_slots=SimpleNamespace(shift=shift), slot_positions=slots)
    hidden, valid = torch.zeros(1, 1, 4, device=there), torch.ones(1, 5, device=there).bool()
    tables = (torch.zeros(1), torch.zeros(1))
    rotary = call._rotary(1, held, torch.tensor(7), hidden, {"position_embeddings": tables})
    mask = call._mask(held, valid.unsqueeze(1), torch.ones(1, 1, 1, 9).bool(), hidden)
    assert {rotary[0].device, mask.device} == {there}
