"""The state of one forward call: stages of rows, signals seen, and what each layer is handed."""

from collections.abc import Sequence
from contextvars import Token
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from vispress.runtime.forward.attention_reads import (
    AttentionRead,
    EnoughRead,
    Mode,
    TransitionMeasure,
)
from vispress.runtime.kv_cache.dynamic import layer_at, upgrade
from vispress.runtime.kv_cache.hf_compat import CACHE, cache_of
from vispress.runtime.kv_cache.slots import CompressedLayerMixin, Slots
from vispress.runtime.stages.skip import LayerSkip
from vispress.runtime.tokens import masks
from vispress.runtime.tokens.images import Bucket, Image
from vispress.runtime.tokens.live_tokens import LiveTokens, gather_rotary

if TYPE_CHECKING:
    from vispress.runtime.attachment import Attachment
    from vispress.runtime.stages.decode import Decoding
    from vispress.runtime.stages.select import Decision
    from vispress.runtime.tokens.pair_masks import PairMasks


class _Handed(NamedTuple):
    """What layers are handed that run on the same rows and hold the same before them."""

    before: Slots | None
    after: Slots
    mask: Tensor | None
    rotary: tuple[Tensor, Tensor]


@dataclass(eq=False)
class ForwardState:
    """Everything one call knows. Lives on the stack of that call (and in checkpointed closures).

    Args:
        attachment: The compressed model.
        rows: Stages: rows from a decoder layer on, ascending; the first entry is the whole chunk.
        past: Logical length of the cache before the chunk.
        cache: The cache, or None.
        mask_2d: `[B, past + Q]` bool, or None for no padding at all.
        chunk_valid: `[B, Q]` bool, or None when the chunk has no padding.
        host_valid: The same on the host.
        mask_4d: Whether the caller (or `generate`) gave a 4-D mask over logical positions.
        position_ids: `[B or 1, Q]`, for compact positions.
        images: Images of this call, in order.
        mode: Whether this is the call itself, a look at a layer ahead, or a probe.
        rotary: Tables that the running layer was handed.
    """

    attachment: "Attachment"
    rows: list[tuple[int, LiveTokens]]
    past: int
    cache: Cache | None
    mask_2d: Tensor | None
    chunk_valid: Tensor | None
    host_valid: Tensor | None
    mask_4d: bool
    position_ids: Tensor | None
    images: Sequence[Image] = ()
    buckets: list[Bucket] = field(default_factory=list)
    decided: dict[int, list["Decision"]] = field(default_factory=dict)
    wanted: list[AttentionRead] = field(default_factory=list)
    transitions: dict[int, TransitionMeasure] = field(default_factory=dict)
    text_embeddings: list[Tensor] | None = None
    input_embeddings: Tensor | None = None
    mode: Mode = "run"
    rotary: tuple[Tensor, Tensor] | None = None
    spans: list[LayerSkip] = field(default_factory=list)
    sink: Token[Any] | None = None
    decoding: "Decoding | None" = None
    pairs: "PairMasks | None" = None
    held_from: int | None = None  # layers that are handed their own mask, short or not
    _handed: dict[tuple[Any, ...], "_Handed"] = field(default_factory=dict)
    _rotary: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)
    _plain_past: Slots | None = None
    _empty: Slots | None = None
    _kind: str | None = None

    def to(self, *args: Any, **kwargs: Any) -> "ForwardState":
        """Itself: accelerate's hooks move keyword arguments between devices."""
        return self

    @property
    def last(self) -> LiveTokens:
        """Rows of the newest stage."""
        return self.rows[-1][1]

    @property
    def untouched(self) -> bool:
        """Whether no row was dropped in this call so far."""
        return len(self.rows) == 1

    def rows_at(self, layer: int) -> LiveTokens:
        """Rows that decoder layer `layer` runs on."""
        span = self.span_at(layer)
        return self.rows_before(layer) if span is None else span.rows

    def rows_before(self, layer: int) -> LiveTokens:
        """Rows of the hidden states in front of a layer, those that bypass it included."""
        for start, rows in reversed(self.rows):
            if start <= layer:
                return rows
        raise AssertionError(f"no rows before decoder layer {layer}")

    def span_at(self, layer: int) -> LayerSkip | None:
        """The span of layers that some rows bypass and that `layer` is part of."""
        if not self.spans:  # asked several times a layer
            return None
        return next((span for span in self.spans if span.start <= layer < span.until), None)

    def take(self, layer: int, decision: "Decision") -> None:
        """The rows of a decision are those from `layer` on."""
        self.rows.append((layer, decision.rows))
        if decision.span is not None:
            self.spans.append(decision.span)

    def row_validity(self, rows: LiveTokens) -> Tensor:
        """`[B, P]` bool: real tokens among rows of a stage."""
        valid = self._valid(rows)
        return torch.ones_like(rows.index, dtype=torch.bool) if valid is None else valid

    def _valid(self, rows: LiveTokens) -> Tensor | None:
        """As `row_validity`, or None when every row is a real token."""
        if rows.whole and self.chunk_valid is not None:
            return self.chunk_valid.to(rows.index.device)
        return rows.valid

    # --- what a layer is handed

    def short(self, layer: int) -> bool:
        """Whether a layer needs anything else than what transformers made for the full sequence."""
        if len(self.rows) > 1 and layer >= self.rows[1][0]:
            return True
        if self.held_from is not None and layer >= self.held_from:
            return True
        return self.cache is not None and isinstance(self._held(layer), CompressedLayerMixin)

    def layer_kwargs(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of a short layer, from those for the full sequence."""
        rows = self.rows_at(layer).to(hidden.device)
        held = None if cache_of(kwargs) is None else self._short_layer(layer, rows)
        before = None if held is None else held.slots
        capacity = None if held is None else held.logical_capacity
        given = kwargs.get("attention_mask") if self.mask_4d else None
        key = (id(rows), id(before), capacity, hidden.device, id(given))
        handed = self._handed.get(key)
        if handed is None:
            after = self._joined(before, rows)
            offset = 0 if held is None else held.physical
            buffer = rows.size if held is None else held.buffer(after, rows.size)
            mask = self._mask(rows, after, offset, buffer, kwargs, hidden)
            rotary = self._position_embeddings(layer, rows, kwargs, hidden)
            handed = self._handed[key] = _Handed(before, after, mask, rotary)
        if held is not None:
            held.expect(handed.after)
        out = kwargs | {"attention_mask": handed.mask, "position_embeddings": handed.rotary}
        if "position_ids" in out:
            out["position_ids"] = None  # gaps would look like packed sequences to transformers
        return out

    def peek_kwargs(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the layer's attention would get for the rows still there; stores nothing."""
        rows = self.last.to(hidden.device)
        mask, rotary = kwargs.get("attention_mask"), kwargs["position_embeddings"]
        before = self._before(layer, hidden.device)
        if not rows.whole or (before is not None and before is not self._plain_past):
            slots = self._joined(before, rows)
            buffer = slots.positions.shape[1]
            mask = self._mask(rows, slots, buffer - rows.size, buffer, kwargs, hidden)
            rotary = self._position_embeddings(layer, rows, kwargs, hidden)
        return {"attention_mask": mask, "position_embeddings": rotary, CACHE: None}

    def _held(self, layer: int) -> Any:
        assert self.cache is not None
        return self.cache.layers[layer] if layer < len(self.cache.layers) else None

    def _before(self, layer: int, device: torch.device) -> Slots | None:
        """What the cache layer holds before the chunk; one object for layers that hold the same."""
        if self.cache is None:
            return None
        held = self._held(layer)
        if isinstance(held, CompressedLayerMixin):
            return held.slots
        if self.past == 0:
            return None
        if self._plain_past is None:
            batch = self.rows[0][1].index.shape[0]
            positions = torch.arange(self.past, device=device).expand(batch, self.past)
            valid = None if self.mask_2d is None else self.mask_2d[:, : self.past].to(device)
            self._plain_past = Slots(positions, valid, None, self.past)
        return self._plain_past

    def _short_layer(self, layer: int, rows: LiveTokens) -> CompressedLayerMixin:
        """The cache layer that the chunk's rows will be stored in."""
        assert self.cache is not None
        held = layer_at(self.cache, layer)
        if isinstance(held, CompressedLayerMixin):
            return held
        before = self._before(layer, rows.index.device)
        empty = self._empty = self._empty or Slots(rows.index[:, :0], None, None, 0)
        return upgrade(self.cache, layer, empty if before is None else before)

    def _joined(self, before: Slots | None, rows: LiveTokens) -> Slots:
        """What a layer holds once the chunk's rows are behind what it held."""
        positions, logical = rows.index + self.past, self.past + rows.length
        return Slots(positions, self._valid(rows), rows.total_shift, logical).behind(before)

    def _mask(
        self,
        rows: LiveTokens,
        slots: Slots,
        offset: int,
        buffer: int,
        kwargs: dict[str, Any],
        hidden: Tensor,
    ) -> Tensor | None:
        given = kwargs.get("attention_mask") if self.mask_4d else None
        if self._kind is None:
            config = self.attachment.adapter.language_model.config
            self._kind = masks.check_implementation(config._attn_implementation)
        return masks.make_mask(self._kind, rows, slots, self.past, offset, buffer, given, hidden)

    def _position_embeddings(
        self, layer: int, rows: LiveTokens, kwargs: dict[str, Any], hidden: Tensor
    ) -> tuple[Tensor, Tensor]:
        given: tuple[Tensor, Tensor] = kwargs["position_embeddings"]
        held = self._held(layer) if self.cache is not None else None
        before = held.slots.shift if isinstance(held, CompressedLayerMixin) else None
        key = (id(rows), id(before), hidden.device)
        if key in self._rotary:
            return self._rotary[key]
        if rows.shift is None and before is None:
            if not rows.whole:
                cos, sin = (table.to(hidden.device) for table in given)
                given = gather_rotary((cos, sin), rows.index, self.attachment.backend)
        else:
            assert self.position_ids is not None
            ids = self.position_ids.to(hidden.device).expand(rows.index.shape[0], -1)
            ids = ids.gather(1, rows.index)
            ids = ids if rows.shift is None else ids - rows.shift
            ids = ids if before is None else ids - before.to(hidden.device).unsqueeze(1)
            given = self.attachment.adapter.language_model.rotary_emb(hidden, ids.clamp(min=0))
        self._rotary[key] = given
        return given

    # --- attention rows

    def observe(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> None:
        """Read the wanted rows of a watched decoder layer (see `attention.Sink`)."""
        scaling, peeking = float(kwargs["scaling"]), self.mode == "peek"
        for want in self.wanted:
            here = want.layer == module.layer_idx and want.mode == self.mode
            if here and not want.seen and want.needed(self.buckets):
                rows = self.last if peeking else self.rows_at(want.layer)
                want.offset = self._offset(want.layer, rows)
                if peeking and want.offset:  # its update did not run: the past is still apart
                    past = self._held(want.layer).keys
                    key = torch.cat([past[:, :, : want.offset].to(key.device), key], dim=2)
                valid, plain = self._valid(rows), self.past == 0 and not self.mask_4d
                backend = self.attachment.backend
                want.read(rows, query, key, mask, valid, plain, scaling, self.rotary, backend)
        if peeking or (self.mode == "probe" and all(want.seen for want in self.wanted)):
            raise EnoughRead

    def _offset(self, layer: int, rows: LiveTokens) -> int:
        """Slot of the chunk's first row among the keys of a layer."""
        if self.cache is None or self.past == 0:
            return 0
        held = self._held(layer)
        if isinstance(held, CompressedLayerMixin):
            return held.physical - (0 if self.mode == "peek" else rows.size)
        return self.past
