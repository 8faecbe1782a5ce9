"""Many generates in one process hold no more memory than a few."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.laws.cases import FAMILIES, inputs_of, logits_of, make, model_of
from tests.laws.selection import ways
from tests.tiny import build
from torch import Tensor

from vispress import compress_model, compressed, remove_compression, update_compression

pytestmark = pytest.mark.full

GENERATES, WARM = 300, 40
STAGES = sorted({trait for way in ways() for trait in way if trait.startswith("stage=")})
METHODS = [next(names[0] for way, names in ways().items() if stage in way) for stage in STAGES]
"""One method a stage."""


def held() -> tuple[int, int]:
    """Bytes in tensors, and objects, that are still reachable."""
    gc.collect()
    objects = gc.get_objects()
    storages = {
        x.untyped_storage()._cdata: x.untyped_storage().nbytes()
        for x in objects
        if isinstance(x, Tensor) and x.layout is torch.strided
    }
    return sum(storages.values()), len(objects)


def assert_flat(before: tuple[int, int]) -> None:
    """No tensor is held that was not, and no object a call."""
    size, objects = held()
    assert size <= before[0]
    assert objects <= before[1] + GENERATES // 4


def rounds(model: Any, number: int) -> Iterator[Any]:
    """Inputs in turn, so that nothing that is remembered of one fits the next."""
    family = inputs_of("qwen2_5_vl")
    for place in range(number):
        ids = family["input_ids"]
        shift = (ids >= 3) & (ids < 100)
        yield dict(family) | {"input_ids": torch.where(shift, 3 + (ids + place) % 97, ids)}


@pytest.mark.parametrize("method", METHODS)
def test_three_hundred_generates_hold_what_forty_do(method: str) -> None:
    model = build("qwen2_5_vl", dtype=torch.float64)
    with compressed(model, make("qwen2_5_vl", method)) as report:
        for inputs in rounds(model, WARM):
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert report.report
        before = held()
        for inputs in rounds(model, GENERATES - WARM):
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert report.report
        del inputs
        assert_flat(before)


@pytest.mark.parametrize("family", FAMILIES)
def test_three_hundred_changes_of_method_and_budget_hold_what_forty_do(family: str) -> None:
    """The model is compressed, told of another budget, and set free again."""
    model, inputs = model_of(family), inputs_of(family)

    def change(place: int) -> None:
        compress_model(model, make(family, "fastv", layer=1 + place % 4))
        update_compression(model, keep_ratio=0.2 + place % 7 / 10)
        logits_of(model, inputs)
        remove_compression(model)

    for place in range(WARM):
        change(place)
    before = held()
    for place in range(GENERATES - WARM):
        change(place)
    assert_flat(before)
