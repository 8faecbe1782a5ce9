"""What releases of transformers changed about KV caches: keyword, resets, prefills in chunks."""

import inspect
from collections.abc import Mapping
from typing import Any, Final

from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation import utils as generation
from transformers.models.llama.modeling_llama import LlamaModel

OLD: Final = "past_key_values"

CACHE: Final = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else OLD
"""`"cache"` since transformers 5.24, `"past_key_values"` before."""

LINEAR_LAYERS: Final[tuple[type, ...]] = tuple(
    vars(cache_utils)[name] for name in ("LinearAttentionLayer",) if hasattr(cache_utils, name)
)
"""Cache layers that hold the states of a linear-attention layer; none in old releases."""

GROWING_LAYERS_FORGET: Final = "reset" in vars(DynamicLayer)
"""Whether `reset` empties them; transformers 5.17 zeroes keys and values and keeps their length."""

CHUNKS_HAVE_PICTURES: Final = hasattr(generation, "_slice_mm_encoder_output")
"""Whether chunks of a prompt (`prefill_chunk_size`) are given features; 5.17 loses the pictures."""


def cache_of(kwargs: Mapping[str, Any]) -> Cache | None:
    """The cache among keyword arguments, under either name."""
    found: Cache | None = kwargs.get(CACHE)
    return kwargs.get(OLD) if found is None else found


def renamed(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same keyword arguments with the cache, if they name it, under today's name only."""
    if OLD == CACHE or OLD not in kwargs:
        return kwargs
    rest = {name: value for name, value in kwargs.items() if name != OLD}
    return rest | {CACHE: cache_of(kwargs)}
