"""A probe: the first decoder layers run once ahead of the LLM, to be asked for attention.

It is a forward of the language model itself, with a state of its own, that ends where the rows are
read: masks, rotary tables and DeepStack are the model's. It stores nothing in the user's cache.
"""

from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from vispress.runtime.forward.attention_reads import EnoughRead, attention_layers
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.hooks.attention import watching
from vispress.runtime.kv_cache.dynamic import CompressedDynamicLayer, physical_length
from vispress.runtime.kv_cache.hf_compat import CACHE
from vispress.runtime.kv_cache.slots import CompressedLayerMixin
from vispress.types import Placement

STATE = "vispress_state"
"""Keyword argument that carries the state of a call to the decoder layers."""


@torch.no_grad()
def probe(
    state: ForwardState,
    placement: Placement,
    module: Any,
    given: Mapping[str, Any],
    embeds: Tensor,
) -> None:
    """Read the attention that a placement asks a probe for, on the rows that are there.

    Args:
        state: The call; of it, only the rows that are wanted change.
        placement: Whose `probe` layer is the last one to run (its attention runs to q and k).
        module: The language model.
        given: Keyword arguments of its call.
        embeds: `[B, Q, D]`, what enters the LLM, at the logical length.
    """
    (layer,) = attention_layers(placement)
    wanted = [want for want in state.wanted if want.serves(placement, layer)]
    for want in wanted:  # a probe before may have seen more rows
        want.seen = False
    cache = None if state.cache is None or state.past == 0 else _view(state.cache, layer + 1)
    twin = ForwardState(
        attachment=state.attachment,
        rows=list(state.rows),
        past=state.past,
        cache=cache,
        mask_2d=state.mask_2d,
        chunk_valid=state.chunk_valid,
        host_valid=state.host_valid,
        mask_4d=state.mask_4d,
        position_ids=state.position_ids,
        images=state.images,
        buckets=state.buckets,
        decided={number: [] for number in range(1, layer + 1)},  # no placement acts
        wanted=wanted,
        mode="probe",
    )
    arguments = {
        **given,
        "input_ids": None,
        "inputs_embeds": embeds,
        "attention_mask": _cut(given.get("attention_mask"), state.past + embeds.shape[1]),
        "use_cache": False,
        "output_attentions": False,
        "output_hidden_states": False,
        CACHE: cache,
        STATE: twin,
    }
    # dropout (LoRA) must not move the generators of the real run
    devices = [embeds.device] if embeds.is_cuda and module.training else []
    try:
        with watching(twin), torch.random.fork_rng(devices=devices, enabled=module.training):
            module.forward(**arguments)
    except EnoughRead:
        pass


def _view(cache: Cache, count: int) -> Cache:
    """What the first layers of a cache hold, in layers whose growth does not reach the cache."""
    view = DynamicCache()
    view.layers = [_twin(layer) for layer in cache.layers[:count]]
    return view


def _twin(held: CacheLayerMixin) -> CacheLayerMixin:
    if isinstance(held, DynamicLayer):
        return copy(held)  # grows into new tensors
    layer, length = DynamicLayer(), physical_length(held)  # a static buffer grows in place
    assert held.keys is not None
    assert held.values is not None
    layer.update(held.keys[:, :, :length], held.values[:, :, :length])
    return (
        CompressedDynamicLayer.upgrade(layer, held.slots)
        if isinstance(held, CompressedLayerMixin)
        else layer
    )


def _cut(mask: Any, length: int) -> Any:
    """A mask over keys, without the columns of a static buffer that nothing is stored in."""
    if isinstance(mask, dict):
        return {name: _cut(each, length) for name, each in mask.items()}
    return mask[..., :length] if isinstance(mask, Tensor) and mask.ndim == 4 else mask
