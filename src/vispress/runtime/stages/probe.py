"""Run the first decoder layers once ahead of the LLM, to be asked for attention: a probe.

It is a forward of the language model itself, with a state of its own, that ends where the rows are
read: masks, rotary tables and DeepStack are the model's. It stores nothing in the user's cache.
"""

from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from vispress.runtime.forward.apply_placement import asks
from vispress.runtime.forward.attention_reads import EnoughRead, attention_layers
from vispress.runtime.forward.running import RUNNING, Running, carry_deepstack
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.kv_cache.cache_layers import compressed_twin, slots_ahead
from vispress.runtime.kv_cache.hf_compat import CACHE, LINEAR_LAYERS
from vispress.runtime.kv_cache.slots import CompressedLayerMixin
from vispress.runtime.plan.bound import BoundPlacement
from vispress.runtime.stages.base import Binding, Entering, RuntimeStage, StageCall
from vispress.types import Placement


def bind(binding: Binding) -> RuntimeStage | None:
    """Make the stage of a chain with a placement that asks for a probe."""
    layers = {b.placement.probe for b in binding.placements} - {None}
    if not layers:
        return None
    watched = frozenset(layer for layer in layers if layer is not None)
    return RuntimeStage(carries=frozenset(), open=_open, order=10, watched_layers=watched)


def _open(state: ForwardState) -> StageCall | None:
    return StageCall(before_placement=partial(_probe_for, state)) if state.images else None


def _probe_for(state: ForwardState, bound: BoundPlacement, entering: Entering) -> None:
    """Run a probe if the placement asks for one and reads it for any image."""
    for read in state.reads:  # rows of the placement before are used by now, and large
        if read.mode == "probe" and read.seen:
            read.forget()
    if bound.placement.probe is not None and asks(state, bound):
        probe(state, bound.placement, entering)


@torch.no_grad()
def probe(state: ForwardState, placement: Placement, entering: Entering) -> None:
    """Read the attention that a placement asks a probe for, on the rows that are there.

    Args:
        state: The call; of it, only the rows that are read change.
        placement: Whose `probe` layer is the last one to run (its attention runs to q and k).
        entering: The language model, keyword arguments of its call, and `[B, Q, D]` what enters it
            at the logical length.
    """
    module, given, embeds = entering.module, entering.kwargs, entering.hidden
    (layer,) = attention_layers(placement)
    reads = [read for read in state.reads if read.serves(placement, layer)]
    for read in reads:  # a probe before may have seen more rows
        read.seen = False
    cache = None if state.cache is None or state.past == 0 else _view(state.cache, layer + 1)
    twin = state.ahead(cache, reads)
    arguments = {
        **given,
        "input_ids": None,
        "inputs_embeds": embeds,
        "attention_mask": _cut(given.get("attention_mask"), state.past + embeds.shape[1]),
        "use_cache": False,
        "output_attentions": False,
        "output_hidden_states": False,
        CACHE: cache,
        RUNNING: Running(twin, ()),
    }
    carry_deepstack(arguments, twin)
    # dropout (LoRA) must not move the generators of the real run
    devices = [embeds.device] if embeds.is_cuda and module.training else []
    try:
        with torch.random.fork_rng(devices=devices, enabled=module.training):
            module.forward(**arguments)
    except EnoughRead:
        pass


def _view(cache: Cache, count: int) -> Cache:
    """What the first layers of a cache hold, in layers whose growth does not reach the cache."""
    view = DynamicCache()
    view.layers = [_twin(layer) for layer in cache.layers[:count]]
    return view


def _twin(held: Any) -> Any:
    if isinstance(held, LINEAR_LAYERS):  # its states are written in place
        twin = copy(held)
        twin.__dict__.update({name: _cloned(value) for name, value in vars(held).items()})
        return twin
    if isinstance(held, DynamicLayer):
        return copy(held)  # grows into new tensors
    layer, length = DynamicLayer(), slots_ahead(held)  # a static buffer grows in place
    assert held.keys is not None
    assert held.values is not None
    layer.update(held.keys[:, :, :length], held.values[:, :, :length])
    short = isinstance(held, CompressedLayerMixin)
    return compressed_twin(layer, held.slots) if short else layer


def _cloned(value: Any) -> Any:
    """A dictionary of tensors and settings with tensors of its own; else what it is."""
    if not isinstance(value, dict):
        return value
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in value.items()}


def _cut(mask: Any, length: int) -> Any:
    """A mask over keys, without the columns of a static buffer that nothing is stored in."""
    if isinstance(mask, dict):
        return {name: _cut(each, length) for name, each in mask.items()}
    return mask[..., :length] if isinstance(mask, Tensor) and mask.ndim == 4 else mask
