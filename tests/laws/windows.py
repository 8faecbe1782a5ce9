"""Tiny models whose layers see a part of the sequence.

Gemma 3 hands its language model one mask for each kind of layer, in which the tokens of an image
see each other.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from tests.families import ABSENT
from tests.laws.cases import Run, encoding_as
from tests.laws.decoding import Stepping
from tests.laws.masked import masked_model, with_valid
from tests.laws.oracle import oracle_expand
from tests.tiny import Image, Sample, Text, Video, build, make_inputs
from tests.tiny_models import WINDOWED
from torch import Tensor
from transformers import DynamicCache

from vispress.runtime.kv_cache.hf_compat import CACHE

_ALL: dict[str, tuple[str, str]] = {
    "mistral": ("llava", "sdpa"),
    "qwen2": ("llava", "sdpa"),
    "gpt_oss": ("llava", "eager"),
    "gemma3": ("gemma3", "sdpa"),
    "video": ("llava_onevision", "sdpa"),
}
MODELS = {name: model for name, model in _ALL.items() if model[0] not in ABSENT}
"""Family and attention by name of a model; that for videos is over the mixed Qwen2."""

SAMPLES = (
    Sample([Text(5), Image(4, 4), Text(7)]),
    Sample([Text(3)]),
    Sample([Text(2), Image(4, 4), Text(3), Image(4, 4), Text(4)]),
)
VIDEO_SAMPLES = (
    Sample([Text(3), Video(3, 4, 4), Text(6)]),
    Sample([Text(2), Video(3, 4, 4), Text(3)]),
)
NEW = 4
"""Tokens of an answer."""
WINDOWS = ("short", "part", "prompt", "answer", "long")


@cache
def windowed(name: str, window: int, dtype: torch.dtype = torch.float64, attn: str = "") -> Any:
    """A model by name; tests must leave it as they found it."""
    family, implementation = MODELS[name]
    text = WINDOWED["qwen2" if name == "video" else name] | {"sliding_window": window}
    return build(family, dtype=dtype, attn=attn or implementation, text=text)


@cache
def batch(name: str, padding: str = "left", dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Prompts of unequal lengths, one without an image."""
    samples = VIDEO_SAMPLES if name == "video" else SAMPLES
    return make_inputs(MODELS[name][0], samples, padding=padding, dtype=dtype)


def window_of(name: str, window: str) -> int:
    """Its length: shorter than an image, than the prompt, as long as it, reached by the answer."""
    length = int(batch(name)["input_ids"].shape[1])
    lengths = {"short": 8, "part": 20, "prompt": length, "answer": length + 2, "long": 4 * length}
    return lengths[window]


def compressor_settings(name: str, method: str) -> dict[str, Any]:
    """Arguments beside a method's name."""
    plain = ("pyramiddrop", "sparsevlm", "transprune")
    found: dict[str, Any] = {} if method in plain else {"keep_ratio": 0.4}
    if method == "visionzip" and name in ("gemma3", "video"):  # no [CLS] there
        found["scores"] = "column_mean"
    return found


@contextmanager
def masking(
    model: Any, result: Run, inputs: Mapping[str, Any], steps: Stepping | None = None
) -> Iterator[None]:
    """Inside, the untouched model's own masks lack what was dropped, and it sees what was merged.

    Give it a cache that holds everything (`full`).
    """
    alive = with_valid(result.alive, inputs["attention_mask"].bool())
    with (
        encoding_as(model, result.encoded),
        masked_model(model, alive, result.positions, result.values, steps),
    ):
        yield


def full() -> dict[str, Any]:
    """A cache that holds every position, whatever the windows are."""
    return {CACHE: DynamicCache()}


def expected_logits(model: Any, result: Run, inputs: Mapping[str, Any], **more: Any) -> Tensor:
    """`[B, L, V]` that a compressed forward without a cache must give."""
    with masking(model, result, inputs):
        logits = model(**inputs, use_cache=False, **more).logits
    return oracle_expand(logits, result.alive[-1])


def generate(model: Any, inputs: Mapping[str, Any], **more: Any) -> Any:
    """An answer of `NEW` tokens, with the logits of each step."""
    torch.manual_seed(7)
    return model.generate(
        **inputs, **({"do_sample": False} | more), max_new_tokens=NEW, min_new_tokens=NEW,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip


def assert_same(got: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """The same tokens, and logits within rounding."""
    assert torch.equal(got.sequences, expected.sequences)
    difference = torch.stack(got.logits, 1) - torch.stack(expected.logits, 1)
    assert difference.abs().max() < tolerance
