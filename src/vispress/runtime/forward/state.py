"""Hold the state of one language-model call: live tokens by depth, reads, what layers get."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from vispress.adapters.decoder import FULL
from vispress.devices import sent
from vispress.runtime.forward.attention_reads import (
    AttentionRead,
    EnoughRead,
    Mode,
    TransitionMeasure,
)
from vispress.runtime.forward.decision import Decision
from vispress.runtime.hooks.attention import Softmax
from vispress.runtime.kv_cache.cache_layers import slots_ahead
from vispress.runtime.kv_cache.slots import CompressedLayerMixin, Slots
from vispress.runtime.layout import Prompt, PromptLayout
from vispress.runtime.plan.plan import Plan
from vispress.runtime.tokens.images import Bucket, Image
from vispress.runtime.tokens.live_tokens import LiveTokens


@dataclass(frozen=True, eq=False)
class Span:
    """Decoder layers that run on some of the rows that stand between them.

    Args:
        start: First layer of the span.
        until: First layer behind it.
        rows: Live tokens that the layers run on.
        gate: `[B, Q]`, what the MLP's output of each row is multiplied by, or None for nothing.
    """

    start: int
    until: int
    rows: LiveTokens
    gate: Tensor | None


@dataclass(eq=False)
class ForwardState:
    """Everything one call knows. Lives on the stack of that call (and in checkpointed closures).

    Args:
        plan: What is asked of the model.
        rows: Live tokens from a decoder layer on, ascending; the first entry is the whole chunk.
        past: Logical length of the cache before the chunk.
        cache: The cache, or None.
        mask_2d: `[B, past + Q]` bool, or None for no padding at all.
        chunk_valid: `[B, Q]` bool, or None when the chunk has no padding.
        host_valid: The same on the host.
        mask_4d: Whether the caller (or `generate`) gave a 4-D mask over logical positions, or one
            for each kind of layer.
        plain_masks: Whether layers with full attention have masks of causality and padding alone:
            not where the caller gave 4-D ones, nor where rows may hold several sequences, which
            transformers looks for where there is neither a mask nor a cache.
        position_ids: `[B or 1, Q]`, for compact positions.
        images: Images of this call, in order.
        layout: What the prompt is; None of a call that brings no images.
        asking: `[B, Q]` bool on the host, tokens that are neither padding nor answers.
        gist: `[B, Q]` bool on the host, tokens that stand for images; None where none are wanted.
        packed: Whether a batch row holds several documents.
        mode: Whether this is the call itself, a look at a layer ahead, or a probe.
        rotary: Tables that the running layer was handed.
        evicted: Of cache layers that were cut behind their attention, what they held, and
            `[B, Hkv or 1, S]` bool, which of it left.
        trains: Whether the call is of a model in training, with gradients: plans may be soft.
        entered: Rows that entered a decoder layer, and what they were, while it runs.
        update: The same rows behind it, and `[B, P]` fp32, how far it moved each.
        softened: `[B, Q]` added to the logits of keys from a decoder layer on (differentiable).
    """

    plan: Plan
    rows: list[tuple[int, LiveTokens]]
    past: int
    cache: Cache | None
    mask_2d: Tensor | None
    chunk_valid: Tensor | None
    host_valid: Tensor | None
    mask_4d: bool
    plain_masks: bool
    position_ids: Tensor | None
    images: Sequence[Image] = ()
    buckets: list[Bucket] = field(default_factory=list)
    decided: dict[int, list[Decision]] = field(default_factory=dict)
    reads: list[AttentionRead] = field(default_factory=list)
    transitions: dict[int, TransitionMeasure] = field(default_factory=dict)
    layout: PromptLayout | None = None
    asking: Tensor | None = None
    gist: Tensor | None = None
    packed: bool = False
    text_embeddings: dict[Prompt, Tensor] = field(default_factory=dict)
    input_embeddings: Tensor | None = None
    mode: Mode = "run"
    rotary: tuple[Tensor, Tensor] | None = None
    spans: list[Span] = field(default_factory=list)
    evicted: dict[int, tuple[Slots, Tensor]] = field(default_factory=dict)
    trains: bool = False
    softened: list[tuple[int, Tensor]] = field(default_factory=list)
    entered: tuple[LiveTokens, Tensor] | None = None
    update: tuple[LiveTokens, Tensor] | None = None
    own_from: int | None = None  # layers that are handed their own mask, short or not

    @property
    def last(self) -> LiveTokens:
        """Rows of the newest stage."""
        return self.rows[-1][1]

    @property
    def shown_images(self) -> list[Image]:
        """Images of which not all is masked: for a method the others are not there."""
        return [image for image in self.images if image.num_shown]

    @property
    def untouched(self) -> bool:
        """Whether no row was dropped in this call so far."""
        return len(self.rows) == 1

    def rows_at(self, layer: int) -> LiveTokens:
        """Rows that decoder layer `layer` runs on."""
        if self.spans and (span := self.span_at(layer)) is not None:
            return span.rows
        for start, rows in reversed(self.rows):  # every layer asks
            if start <= layer:
                return rows
        raise AssertionError(f"no rows at decoder layer {layer}")

    def rows_before(self, layer: int) -> LiveTokens:
        """Rows of the hidden states in front of a layer, those that bypass it included."""
        for start, rows in reversed(self.rows):
            if start <= layer:
                return rows
        raise AssertionError(f"no rows before decoder layer {layer}")

    def span_at(self, layer: int) -> Span | None:
        """The span that `layer` is part of."""
        if not self.spans:  # asked several times a layer
            return None
        return next((span for span in self.spans if span.start <= layer < span.until), None)

    def soft_at(self, layer: int) -> Tensor | None:
        """`[B, Q]`, what keys lose of their logits in a layer; None: all count whole."""
        found = [bias for start, bias in self.softened if start <= layer]
        return sum(found[1:], found[0]) if found else None

    def take(self, layer: int, decision: Decision) -> None:
        """Let the rows of a decision be those from `layer` on."""
        self.rows.append((layer, decision.rows))

    def release(self) -> None:
        """Let go of what no report and no checkpointed layer reads: reports may keep the state."""
        self.cache = self.input_embeddings = self.mask_2d = self.entered = self.update = None
        self.text_embeddings, self.transitions, self.evicted = {}, {}, {}
        self.forget_reads(self.plan.num_layers)

    def forget_reads(self, layer: int) -> None:
        """Let go of attention rows that no placement behind `layer` reads: they are large."""
        for read in self.reads:
            if read.seen and read.until <= layer:
                read.forget()

    def ahead(self, cache: Cache | None, reads: list[AttentionRead]) -> "ForwardState":
        """A state for a pass through the first layers ahead of the call, on the rows still there.

        Args:
            cache: What those layers hold.
            reads: Attention rows that the pass is for.
        """
        return replace(
            self,
            rows=list(self.rows),
            cache=cache,
            reads=reads,
            mode="probe",
            decided={number: [] for number in range(1, self.plan.num_layers)},  # none acts
            transitions={},
            spans=[],
            softened=[],
            evicted={},
            own_from=None,
        )

    def row_validity(self, rows: LiveTokens) -> Tensor:
        """`[B, P]` bool: real tokens among rows of a stage."""
        valid = self.valid_rows(rows)
        return torch.ones_like(rows.index, dtype=torch.bool) if valid is None else valid

    def valid_rows(self, rows: LiveTokens) -> Tensor | None:
        """`[B, P]` bool: real tokens among rows; None when all are."""
        if rows.whole and self.chunk_valid is not None:
            return self.chunk_valid.to(rows.index.device)
        return rows.valid

    def cache_layer(self, layer: int) -> Any:
        """The cache's layer of a number, plain or compressed; None when it is not made yet."""
        if self.cache is None or layer >= len(self.cache.layers):
            return None
        return self.cache.layers[layer]

    def short(self, layer: int) -> bool:
        """Whether a layer needs anything else than what transformers made for the full sequence."""
        if len(self.rows) > 1 and layer >= self.rows[1][0]:
            return True
        if self.own_from is not None and layer >= self.own_from:
            return True
        if self.cache is None or layer >= len(self.cache.layers):
            return False
        return isinstance(self.cache.layers[layer], CompressedLayerMixin)

    def plain_mask(self, layer: int, mask: Tensor | None) -> bool:
        """Whether the mask of a layer is known to be causality and padding alone."""
        if mask is None or mask.ndim != 4:
            return True
        soft = any(start <= layer for start, _ in self.softened)
        plain = self.plain_masks and not self.packed and not soft
        return plain and self.plan.layer_types[layer] == FULL

    def observe(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        kwargs: Mapping[str, Any],
    ) -> None:
        """Read the rows that placements want of a watched decoder layer."""
        for want in self.reads:
            here = want.layer == module.layer_idx and want.mode == self.mode
            if here and not want.seen and want.needed(self.buckets):
                rows = self.last if self.mode == "peek" else self.rows_at(want.layer)
                self.read(want, rows, query, key, mask, Softmax.of(kwargs))
        if self.mode == "peek" or (self.mode == "probe" and all(want.seen for want in self.reads)):
            raise EnoughRead

    def read(
        self,
        want: AttentionRead,
        rows: LiveTokens,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        softmax: Softmax,
    ) -> None:
        """Read some rows of what a layer's attention is called with."""
        want.offset = self._offset(want.layer, rows, key)
        if self.mode == "peek" and want.offset:  # its update did not run: the past is still apart
            key = torch.cat([self._past_keys(want).to(key.device), key], dim=2)
        valid = self.valid_rows(rows)
        plain = self.past == 0 and not (self.mask_4d or self.packed)
        plain = plain and self.plain_mask(want.layer, mask)
        documents = self.documents(rows) if self.packed else None
        want.read(
            rows,
            query,
            key,
            mask,
            valid,
            plain,
            softmax,
            self.rotary,
            self.plan.backend,
            documents,
            self.plan.shards(query.shape[1]),
        )

    def documents(self, rows: LiveTokens) -> Tensor:
        """`[B, P]` int64, number of the document of each row; -1 where it is padding."""
        assert self.layout is not None
        numbers = sent(self.layout.document_of, rows.index.device).gather(1, rows.index)
        return numbers if rows.valid is None else numbers.masked_fill(~rows.valid, -1)

    def _offset(self, layer: int, rows: LiveTokens, key: Tensor) -> int:
        """Slot of the chunk's first row among the keys `[B, Hkv, S, D]` of a layer."""
        if self.cache is None or self.past == 0:
            return 0
        held = self.cache_layer(layer)
        if self.mode == "peek":
            return slots_ahead(held)
        if isinstance(held, DynamicLayer):  # what it held may have left a sliding window by now
            return key.shape[2] - rows.size
        return held.physical - rows.size if isinstance(held, CompressedLayerMixin) else self.past

    def _past_keys(self, read: AttentionRead) -> Tensor:
        """`[B, Hkv, offset, D]`: keys that a layer holds ahead of the chunk's."""
        held = self.cache_layer(read.layer)
        keys: Tensor = held.keys
        # a sliding layer may hold earlier ones, a static buffer has room behind
        start = keys.shape[2] - read.offset if isinstance(held, DynamicLayer) else 0
        return keys[:, :, start : start + read.offset]
