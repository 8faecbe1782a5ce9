"""Hold what is asked of one model: compressors, placements, signals. Made once, never changed."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Final

import torch.distributed as dist
from torch import Tensor

from vispress.adapters.base import ModelAdapter
from vispress.adapters.decoder import has_rotary_by_type, linear_layers, window_of
from vispress.errors import CompressionStateError
from vispress.kinds import ATTENTION_SIGNALS, ENCODER_SIGNALS, Queries, Signal
from vispress.methods.base import Compressor
from vispress.runtime.hooks.head_shards import HeadShards
from vispress.runtime.kv_cache.cache_layers import Remembering
from vispress.runtime.layout import Bounded
from vispress.runtime.plan.bound import BoundPlacement
from vispress_kernels import Backend

_NONE = Remembering()
SURVEYS: Final = 64
"""Layouts of prompts that are remembered."""


class Plan:
    """Hold what is asked of one model; every call reads it, and writes to `surveys` alone.

    Args:
        adapter: Knows the model.
        methods: The chain of compressors.
        placements: Theirs, in the order they act.
        backend: Kernels to use.
        notes: Remarks for reports.
        shards: Processes that share the heads of the language model, if any do.
        remembering: Methods that go on acting on what they left in a cache.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        methods: Sequence[Compressor],
        placements: Sequence[BoundPlacement],
        backend: Backend,
        notes: Sequence[str] = (),
        shards: HeadShards | None = None,
        remembering: Remembering = _NONE,
        *,
        caches_layouts: bool = True,
    ) -> None:
        self.caches_layouts, self.surveys = caches_layouts, Bounded[Any](SURVEYS)
        self.adapter, self.backend, self.remembering = adapter, backend, remembering
        self.methods, self.placements = tuple(methods), tuple(placements)
        self.notes, self._shards = tuple(notes), shards
        self._heads: int | None = getattr(
            adapter.language_model.config, "num_attention_heads", None
        )
        self._language_model = adapter.language_model
        gists = (method.gist_evictor() for method in methods)
        self._gist = next((gist for gist in gists if gist is not None), None)
        self.num_layers = len(adapter.decoder_layers)
        self.feature_choice = adapter.feature_choice({})
        self.placeholders = adapter.placeholders()
        self.layer_types = tuple(adapter.layer_types)
        self.linear = linear_layers(self.layer_types)
        """Decoder layers that have a state in place of keys and values."""
        config = adapter.language_model.config
        self.windows = tuple(window_of(config, kind) for kind in self.layer_types)
        """Positions that each decoder layer sees; None for all."""
        self.uniform = len({*self.layer_types}) == 1 and not any(self.windows)
        """Whether all decoder layers have the same attention, without a window."""
        rotary = getattr(adapter.language_model.rotary_emb, "rope_type", None)
        self.fixed_rotary = rotary in ("default", "linear", "llama3", "yarn")
        """Whether rotary tables of a position do not depend on how many there are."""
        self._rotary_by_type = has_rotary_by_type(adapter.language_model)
        at: dict[int, tuple[BoundPlacement, ...]] = {}
        for bound in placements:
            at[bound.placement.layer] = (*at.get(bound.placement.layer, ()), bound)
        self.placements_at: Mapping[int, tuple[BoundPlacement, ...]] = at
        signals = frozenset[Signal]().union(*(method.signals() for method in methods))
        self.encoder_signals = signals & ENCODER_SIGNALS
        reads = ATTENTION_SIGNALS | {Signal.VISION_KEYS}
        self.encoder_readers = tuple(
            m.name for m in methods if m.signals() & reads or m.changes_encoder()
        )
        self.reads_encoder_late = any(
            bound.placement.layer > 0 and bound.method.signals() & self.encoder_signals
            for bound in placements
        )
        self.update_layers = frozenset(
            bound.placement.layer
            for bound in placements
            if bound.placement.layer > 0 and Signal.UPDATE_NORM in bound.method.signals()
        )
        """Decoder layers in front of which it is read how far the one before moved its rows."""
        self.trained = any(method.trained for method in methods)
        self.softens_keys = any(method.softens == "keys" for method in methods)
        self.reads_input = Signal.INPUT_EMBEDDINGS in signals
        self.reads_text = Signal.TEXT_EMBEDDINGS in signals
        self.reads_context = Signal.CONTEXT in signals or any(
            bound.placement.images != "all" for bound in placements
        )
        self.by_text = bool(signals & {Signal.TEXT_EMBEDDINGS, Signal.TEXT_STATES}) or any(
            bound.placement.queries in (Queries.TEXT_AFTER, Queries.LAST_FOUR)
            for bound in placements
        )
        self.reads_ends = any(bound.placement.queries is Queries.ENDS for bound in placements)

    @property
    def implementation(self) -> str | None:
        """The decoder's attention implementation now; users may set another one at any time."""
        return self._language_model.config._attn_implementation  # type: ignore[no-any-return]

    @property
    def gist_token(self) -> int | None:
        """Id of the tokens that stand for images; None where no method has any."""
        if self._gist is None or self._gist.gist_token is not None:
            return None if self._gist is None else self._gist.gist_token
        return vocabulary_of(self.adapter) - 1

    @cached_property
    def mlp_shares(self) -> tuple[float, ...] | None:
        """Share of each decoder layer's MLP that visual tokens go through; None for all."""
        for method in self.methods:
            if (pruner := method.compute_pruner()) is not None:
                return tuple(own.ffn_share for own in pruner.compute(self.num_layers))
        return None

    def rotary(self, layer: int, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the rotary tables of a decoder layer.

        Args:
            layer: The layer.
            hidden: Gives dtype and device.
            position_ids: `[B, P]`.
        """
        kind = (self.layer_types[layer],) if self._rotary_by_type else ()
        tables: tuple[Tensor, Tensor] = self.adapter.language_model.rotary_emb(
            hidden, position_ids, *kind
        )
        return tables

    def shards(self, heads: int) -> HeadShards | None:
        """Give the processes that have the other heads of an attention; None: it has all.

        Args:
            heads: Of the queries it is called with.

        Raises:
            CompressionStateError: The heads were dealt out after the model was compressed.
        """
        if self._heads is None or heads == self._heads:
            return None
        if self._shards is not None and heads * self._shards.size == self._heads:
            return self._shards
        others = self._heads % heads == 0 and dist.is_available() and dist.is_initialized()
        if others and dist.get_world_size() > 1:
            raise CompressionStateError(
                f"attention has {heads} of {self._heads} heads here, and which processes have the "
                "others was not known when the model was compressed (tensor parallelism): call "
                "compress_model behind what deals them out"
            )
        return None

    @cached_property
    def asked_of_encoder(self) -> tuple[object, ...]:
        """What calls of the vision encoder show and merge: of use to plans that ask the same."""
        merging = tuple(one for one in self.methods if one.changes_encoder())
        return self.encoder_signals, self.all_encoder_layers, self.key_layers, merging

    @cached_property
    def readers(self) -> tuple[Compressor, ...]:
        """Compressors that are shown signals: views in place of what is composed of them."""
        return tuple(one for method in self.methods for one in method.views() or (method,))

    def encoder_layers(self, method: Compressor, signal: Signal) -> tuple[int, ...]:
        """Encoder layers that `method` reads; of column attention, those that can be compared."""
        layers = method.encoder_layers(
            len(self.adapter.encoder_attentions()), self.adapter.feature_layer()
        )
        if signal in (Signal.COLUMN_ATTENTION, Signal.PATCH_ATTENTION):
            comparable = set(self.adapter.global_layers())
            layers = tuple(layer for layer in layers if layer in comparable)
        return layers or (self.adapter.feature_layer(),)

    @cached_property
    def all_encoder_layers(self) -> tuple[int, ...]:
        """Every encoder layer whose attention is read, ascending."""
        layers: set[int] = set()
        for method in self.readers:
            for signal in method.signals() & ATTENTION_SIGNALS:
                layers |= set(self.encoder_layers(method, signal))
        return tuple(sorted(layers))

    @cached_property
    def key_layers(self) -> frozenset[int]:
        """Encoder layers whose keys are read."""
        return frozenset(
            self.encoder_layers(method, Signal.VISION_KEYS)[-1]
            for method in self.readers
            if Signal.VISION_KEYS in method.signals()
        )


def vocabulary_of(adapter: ModelAdapter) -> int:
    """Count the words that the model has an embedding of, now: users may add some."""
    return int(adapter.base.get_input_embeddings().weight.shape[0])
