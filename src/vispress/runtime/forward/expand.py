"""Give what the language model hands on in the places of the full sequence."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, CacheLayerMixin

from vispress.runtime.forward.state import ForwardState
from vispress.runtime.kv_cache.slots import CompressedLayerMixin
from vispress.runtime.tokens.live_tokens import LiveTokens, gather_rows
from vispress_kernels import Backend


def expand_output(state: ForwardState, output: Any) -> Any:
    """Put the output of a call in logical places; attention maps hold zeros where nothing ran.

    Returns:
        What the language model gives, or None for what it is.
    """
    maps = None if isinstance(output, tuple) else output.get("attentions")
    if maps:
        # layers with linear attention give none
        numbers = [n for n in range(state.plan.num_layers) if n not in state.plan.linear]
        output.attentions = tuple(
            _expand_map(weights, state.rows_at(number), *_columns(state, number))
            for number, weights in zip(numbers, maps, strict=True)
        )
    if state.untouched:
        return output if maps else None
    backend = state.plan.backend
    if isinstance(output, tuple):
        return (_expand(output[0], state.last, backend), *output[1:])
    output.last_hidden_state = _expand(output.last_hidden_state, state.last, backend)
    if output.get("hidden_states") is not None:  # input of layer 0, then the output of each layer
        output.hidden_states = tuple(
            _expand(hidden, state.rows_before(number - 1), backend)
            if number and hidden is not None  # those that were not asked for are None
            else hidden
            for number, hidden in enumerate(output.hidden_states)
        )
    return output


def expand_step(cache: Cache, output: Any) -> Any:
    """Put the attention maps of a decode step on a static cache in logical places, if it has any.

    Returns:
        What the language model gives, or None for what it is.
    """
    maps = None if isinstance(output, tuple) else output.get("attentions")
    if not maps:
        return None
    output.attentions = tuple(
        _expand_map(weights, None, *_stored(held, 0))
        for weights, held in zip(maps, filter(_has_keys, cache.layers), strict=True)
    )
    return output


def _has_keys(held: Any) -> bool:
    return isinstance(held, CacheLayerMixin)


def _expand(hidden: Tensor, rows: LiveTokens, backend: Backend) -> Tensor:
    """`[B, P, D]` to `[B, Q, D]`: dropped places carry the nearest earlier survivor."""
    if rows.whole or hidden.shape[1] != rows.size:
        return hidden
    if not rows.size:
        return hidden.new_zeros(len(hidden), rows.length, hidden.shape[2])
    return gather_rows(hidden, rows.to(hidden.device).place, backend)


def _columns(state: ForwardState, number: int) -> tuple[Tensor | None, Tensor | None, int]:
    """`[B, S]` logical places of a layer's keys (None: as they stand), which are real, and all."""
    rows, held = state.rows_at(number), state.cache_layer(number)
    length = state.past + rows.length
    if isinstance(held, CompressedLayerMixin):
        return _stored(held, length)
    return (None, None, length) if rows.whole else (rows.index, state.valid_rows(rows), length)


def _stored(held: Any, length: int) -> tuple[Tensor | None, Tensor | None, int]:
    if not isinstance(held, CompressedLayerMixin):
        return None, None, length
    return *held.stored(), held.logical_capacity or length


def _expand_map(
    weights: Tensor,
    rows: LiveTokens | None,
    columns: Tensor | None,
    valid: Tensor | None,
    length: int,
) -> Tensor:
    """`[B, H, P, S]` to `[B, H, Q, length]`; differentiable.

    Args:
        weights: Of one layer.
        rows: Live tokens that asked; None for the one token of a step.
        columns: `[B, S']` logical places of the keys, S' at most S (a static buffer is longer than
            what is used); None where they stand in their places.
        valid: `[B, S']`, which of them are real; None for all.
        length: Logical places.
    """
    if columns is not None:
        columns = columns.to(weights.device)
        if valid is not None:
            columns = torch.where(valid.to(weights.device), columns, length)
        columns = F.pad(columns, (0, weights.shape[3] - columns.shape[1]), value=length)
        spare = weights.new_zeros(*weights.shape[:3], length + 1)
        index = columns[:, None, None].expand_as(weights)
        weights = spare.scatter(3, index, weights)[..., :length]
    if rows is None or rows.whole:
        return weights
    rows = rows.to(weights.device)
    place = rows.place[:, None, :, None].expand(-1, weights.shape[1], -1, weights.shape[3])
    return weights.gather(2, place) * rows.alive[:, None, :, None]
