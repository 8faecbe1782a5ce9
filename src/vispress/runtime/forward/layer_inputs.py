"""Make what short decoder layers are handed: masks, rotary tables, places in the cache."""

from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from vispress.errors import UnsupportedModelError
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.kv_cache.cache_layers import layer_at, slots_ahead, upgrade
from vispress.runtime.kv_cache.hf_compat import CACHE
from vispress.runtime.kv_cache.slots import CompressedLayerMixin, Slots
from vispress.runtime.tokens import masks
from vispress.runtime.tokens.live_tokens import LiveTokens, gather_rotary, varlen_kwargs


class _Handed(NamedTuple):
    """What layers are handed that run on the same rows and hold the same before them."""

    before: Slots | None
    after: Slots
    mask: Tensor | None
    rotary: tuple[Tensor, Tensor]


@final
class LayerInputs:
    """What the short layers of one call are handed; made once for all that run on the same rows.

    Layers of one kind of attention (`Plan.layer_types`) are handed one mask and one pair of rotary
    tables by transformers, so what is cut out of them is shared by kind.

    Args:
        state: The call.
    """

    def __init__(self, state: ForwardState) -> None:
        self.state = state
        # keys hold the ids of rows and slots, which the state and the caches keep alive meanwhile
        self._handed: dict[tuple[Any, ...], _Handed] = {}
        self._rotary: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        self._plain_past: dict[int, Slots] = {}
        self._empty: Slots | None = None
        self._kind: str | None = None

    def layer_kwargs(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of a short layer, from those for the full sequence."""
        rows = self.state.rows_at(layer)
        if rows.index.device != hidden.device:
            rows = rows.to(hidden.device)
        if layer in self.state.plan.linear:
            return kwargs | {"attention_mask": self._state_mask(rows), "position_ids": None}
        held = None if kwargs.get(CACHE) is None else self._short_layer(layer, rows)
        before = None if held is None else held.slots
        capacity = None if held is None else held.logical_capacity
        kind = self.state.plan.layer_types[layer]
        key = (id(rows), id(before), capacity, hidden.device, kind)
        handed = self._handed.get(key)
        if handed is None:
            after = self._joined(before, rows)
            offset = 0 if held is None else held.physical
            buffer = rows.size if held is None else held.buffer(after, rows.size)
            mask = self._mask(layer, rows, after, offset, buffer, kwargs, hidden)
            rotary = self._position_embeddings(layer, rows, kwargs, hidden)
            handed = self._handed[key] = _Handed(before, after, mask, rotary)
        if held is not None:
            held.pending = handed.after
        out = kwargs | {"attention_mask": handed.mask, "position_embeddings": handed.rotary}
        if "position_ids" in out:
            out["position_ids"] = None  # gaps would look like packed sequences to transformers
        if self.state.packed:
            out |= varlen_kwargs(rows, self._kind, kwargs)
        return out

    def _state_mask(self, rows: LiveTokens) -> Tensor | None:
        """`[B, P]`, rows that write to the state of a layer; it has seen survivors alone.

        Raises:
            UnsupportedModelError: Padding would stand between what it has seen and what it will.
        """
        valid = self.state.valid_rows(rows)
        if valid is not None and self.state.past and not rows.whole:
            raise UnsupportedModelError(
                "samples keep unequal numbers of tokens on a KV cache that is not empty, and in "
                "layers with linear attention padding between turns changes the state; run these "
                "conversations one by one, or without prefill_chunk_size"
            )
        return valid

    def peek_kwargs(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the layer's attention would get for the rows still there; stores nothing."""
        rows = self.state.last.to(hidden.device)
        mask, rotary = kwargs.get("attention_mask"), kwargs["position_embeddings"]
        held = self.state.cache_layer(layer)
        if not rows.whole or isinstance(held, CompressedLayerMixin):
            slots = self._joined(self._before(layer, hidden.device), rows)
            buffer = slots.size
            mask = self._mask(layer, rows, slots, buffer - rows.size, buffer, kwargs, hidden)
            rotary = self._position_embeddings(layer, rows, kwargs, hidden)
        return {"attention_mask": mask, "position_embeddings": rotary, CACHE: None}

    def _before(self, layer: int, device: torch.device) -> Slots | None:
        """What the cache layer holds before the chunk; one object for layers that hold the same."""
        held = self.state.cache_layer(layer)
        if isinstance(held, CompressedLayerMixin):
            return held.slots
        past = self.state.past
        if held is None or past == 0:
            return None
        count = slots_ahead(held)  # a sliding window's are the latest
        if count not in self._plain_past:
            mask, batch = self.state.mask_2d, self.state.rows[0][1].index.shape[0]
            positions = torch.arange(past - count, past, device=device).expand(batch, count)
            valid = None if mask is None else mask[:, past - count : past].to(device)
            self._plain_past[count] = Slots(positions, valid, None, past, valid is not None)
        return self._plain_past[count]

    def _short_layer(self, layer: int, rows: LiveTokens) -> CompressedLayerMixin:
        """The cache layer that the chunk's rows will be stored in."""
        assert self.state.cache is not None
        held = layer_at(self.state.cache, layer)
        if isinstance(held, CompressedLayerMixin):
            return held
        before = None if self.state.past == 0 else self._before(layer, rows.index.device)
        empty = self._empty = self._empty or Slots(rows.index[:, :0], None, None, 0)
        return upgrade(self.state.cache, layer, empty if before is None else before)

    def _joined(self, before: Slots | None, rows: LiveTokens) -> Slots:
        """What a layer holds once the chunk's rows are behind what it held."""
        past, valid = self.state.past, self.state.valid_rows(rows)
        padded = self.state.host_valid is not None
        positions = rows.index + past if past else rows.index
        slots = Slots(positions, valid, rows.total_shift, past + rows.length, padded)
        return slots.behind(before)

    def _mask(
        self,
        layer: int,
        rows: LiveTokens,
        slots: Slots,
        offset: int,
        buffer: int,
        kwargs: dict[str, Any],
        hidden: Tensor,
    ) -> Tensor | None:
        given = kwargs.get("attention_mask")
        if given is not None and not self.state.plain_mask(layer, given):
            return masks.cut_mask(given, rows, slots, offset, buffer, hidden.device)
        if self._kind is None:
            self._kind = masks.check_implementation(self.state.plan.implementation)
        if self._kind == "flash" and self.state.packed:  # it has bounds, and padding within them
            return None
        shown = self._shown(slots)
        return masks.make_mask(self._kind, rows, shown, self.state.past, offset, buffer, hidden)

    def _shown(self, slots: Slots) -> Slots:
        """The slots, without those that this call's mask hides: an old turn may be left out."""
        mask, past = self.state.mask_2d, self.state.past
        if mask is None or past == 0:
            return slots
        told = mask.to(slots.positions.device).gather(1, slots.positions)
        valid = told if slots.valid is None else slots.valid & told
        return Slots(slots.positions, valid, slots.shift, slots.logical)

    def _position_embeddings(
        self, layer: int, rows: LiveTokens, kwargs: dict[str, Any], hidden: Tensor
    ) -> tuple[Tensor, Tensor]:
        given: tuple[Tensor, Tensor] = kwargs["position_embeddings"]
        held = self.state.cache_layer(layer) if self.state.cache is not None else None
        before = held.slots.shift if isinstance(held, CompressedLayerMixin) else None
        plan = self.state.plan
        key = (id(rows), id(before), hidden.device, plan.layer_types[layer])
        if key in self._rotary:
            return self._rotary[key]
        if rows.shift is None and before is None:
            if not rows.whole:
                cos, sin = (table.to(hidden.device) for table in given)
                given = gather_rotary((cos, sin), rows.index, plan.backend)
        else:
            assert self.state.position_ids is not None
            ids = self.state.position_ids.to(hidden.device).expand(rows.index.shape[0], -1)
            ids = ids.gather(1, rows.index)
            ids = ids if rows.shift is None else ids - rows.shift
            ids = ids if before is None else ids - before.to(hidden.device).unsqueeze(1)
            given = plan.rotary(layer, hidden, ids.clamp(min=0))
        self._rotary[key] = given
        return given
