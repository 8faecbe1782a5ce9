"""What tests of captured models share: calls of one layout, and what they give."""

from collections.abc import Mapping
from typing import Any

import torch
from tests.tiny import Image, Sample, Text, gist_tokens, make_inputs
from torch import Tensor
from transformers import DynamicCache

from vispress import (
    capture,
    compression_report,
)
from vispress.errors import CompressionStateError
from vispress.runtime.kv_cache.hf_compat import CACHE, cache_of

ONE = (Sample([Text(5), Image(4, 4), Text(7)]),)


OTHER = (Sample([Text(9), Image(4, 4), Text(3)]),)


SEEDS = (0, 7)


def batches(family: str, samples: tuple[Sample, ...], gists: int = 0) -> list[dict[str, Any]]:
    """Inputs of one layout."""
    with gist_tokens(gists):
        return [make_inputs(family, samples, padding="left", seed=seed) for seed in SEEDS]


def taped(model: Any, *, prompt_bucket: int = 1, **options: Any) -> Any:
    return capture(model, backend="tape", prompt_bucket=prompt_bucket, **options)


def stored(cache: Any) -> list[Tensor]:
    """What the layers of a cache hold, and where it stood."""
    found = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    for layer in cache.layers:
        slots = getattr(layer, "slots", None)
        parts = () if slots is None else (slots.positions, slots.valid, slots.shift)
        found += [part for part in parts if part is not None]
    return found


def prefill(model: Any, inputs: Mapping[str, Any], **more: Any) -> tuple[list[Tensor], str]:
    """Logits and cache of a prefill, and the report on it."""
    with torch.no_grad():
        out = model(**inputs, **more)
    try:
        report = str(compression_report(model).to_dict()) + str(compression_report(model))
    except CompressionStateError:
        report = ""
    return [out.logits, *stored(cache_of(out))], report


def same(found: tuple[list[Tensor], str], expected: tuple[list[Tensor], str]) -> bool:
    equal = all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))
    return equal and found[1] == expected[1]


def generated(model: Any, inputs: Mapping[str, Any], **more: Any) -> Any:
    greedy = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    return model.generate(
        **inputs, **greedy, return_dict_in_generate=True, output_logits=True, **more
    )


def check(model: Any, captured: Any, inputs: list[dict[str, Any]], expected: list[Any]) -> None:
    for given, wanted in zip((*inputs, *inputs), (*expected, *expected), strict=True):
        assert same(prefill(model, given), wanted)
    assert captured.report().prefills == 4, str(captured.report())
    assert captured.report().recorded == 1


def step(model: Any, cache: Any, mask: Tensor, token: int = 9) -> Tensor:
    """Logits of one token more, of one sample."""
    given = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1, CACHE: cache}
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.full((len(mask), 1), token), **given).logits
    return logits


def begun(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Tensor]:
    cache = DynamicCache()
    with torch.no_grad():
        model(**inputs, **{CACHE: cache})
    return cache, inputs["attention_mask"]


def longer(mask: Tensor, count: int = 1) -> Tensor:
    return torch.cat([mask, mask.new_ones(len(mask), count)], dim=1)
