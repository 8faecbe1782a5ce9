"""Cache layers that report logical lengths and store physical ones.

A layer of the user's cache object is replaced in place when a prefill compresses. Outside, its
length is that of the full sequence; inside it holds the rows that live at that depth, with the
logical position and validity of each slot.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer

from vispress.errors import CompressionStateError, UnsupportedModelError
from vispress.runtime.kv_cache.slots import CompressedLayerMixin, Slots
from vispress.runtime.kv_cache.static import CompressedStaticLayer


class CompressedDynamicLayer(CompressedLayerMixin, DynamicLayer):
    """A growing layer; what `DynamicCache` holds after a compressed prefill."""

    @classmethod
    def upgrade(cls, layer: DynamicLayer, slots: Slots) -> "CompressedDynamicLayer":
        """Take over the keys and values of a plain layer."""
        new = cls()
        new.__dict__.update(layer.__dict__)
        new.slots, new.pending = slots, None
        return new

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the physical rows of a chunk."""
        if self.pending is None:
            self._take_pending()  # says what is wrong
        else:
            self.slots, self.pending = self.pending, None
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys, values

    def reset(self) -> None:
        """Forget all tokens; the layer stays usable with a compressed model."""
        # `update` appends to them; transformers 5.17 would zero them and keep their length
        self.keys = self.values = None
        self.is_initialized = False
        super().reset()
        device = self.slots.positions.device
        batch = self.slots.positions.shape[0]
        empty = torch.zeros(batch, 0, dtype=torch.long, device=device)
        self.slots, self.pending = Slots(empty, None, None, 0), None
        self.selection, self.trail, self.pairs = None, (), None

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens (assisted decoding); only tokens behind the last image.

        Raises:
            CompressionStateError: The cut would reach into compressed rows.
        """
        count = crop_count(tokens_to_remove, self.slots.logical)
        if count == 0:
            return
        tail = self.slots.positions[:, -count:]
        wanted = torch.arange(self.slots.logical - count, self.slots.logical, device=tail.device)
        if tail.shape[1] != count or not bool((tail == wanted).all()):
            raise CompressionStateError(
                f"cannot crop {count} tokens from a compressed cache: the cut reaches into rows "
                "from which "
                "visual tokens were dropped"
            )
        self._take_back(count)
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self.keys[..., :-count, :], self.values[..., :-count, :]
        slots = self.slots
        if self.pairs is not None:
            self.pairs = self.pairs.crop(self.physical - count)
        self.slots = Slots(
            slots.positions[:, :-count],
            None if slots.valid is None else slots.valid[:, :-count],
            slots.shift,
            slots.logical - count,
        )

    def _take_back(self, count: int) -> None:
        """What deeper layers saw before the last tokens; known for those of the last call."""
        if self.selection is None:
            return
        if count > len(self.trail):
            raise CompressionStateError(
                f"cannot crop {count} tokens from this cache: which cached tokens deeper layers "
                f"see while decoding is known before the last {len(self.trail)} only; crop what "
                "the last call added, or compress with dynamic=False"
            )
        *self.trail, self.selection = list(self.trail)[: len(self.trail) - count + 1]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence (contrastive and beam decoding)."""
        batch = self.slots.positions.shape[0]
        super().batch_repeat_interleave(repeats)
        self.slots = self.slots.repeat(repeats)
        self.map_selection(torch.arange(batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences of the batch."""
        super().batch_select_indices(indices)
        self.slots = self.slots.select(indices)
        self.map_selection(indices)


def crop_count(tokens_to_remove: int, logical: int) -> int:
    """Tokens to drop: a negative count, or (transformers 5.17) the positive length to keep."""
    if tokens_to_remove > 0:
        return max(0, logical - tokens_to_remove)
    return min(logical, -tokens_to_remove)


def is_compressed(cache: Cache | None) -> bool:
    """Whether some layer of the cache was filled by a compressed prefill."""
    return cache is not None and any(
        isinstance(layer, CompressedLayerMixin) for layer in getattr(cache, "layers", ())
    )


def expect_nothing(cache: Cache | None) -> None:
    """Take back what layers of a cache expect of a call that was interrupted."""
    for layer in [] if cache is None else getattr(cache, "layers", ()):
        if isinstance(layer, CompressedLayerMixin):
            layer.expect_nothing()


def check_cache(cache: Cache, num_layers: int) -> None:
    """Refuse, by name, caches whose rows the runtime cannot keep short.

    Args:
        cache: The cache.
        num_layers: Of the decoder.

    Raises:
        UnsupportedModelError: The cache or one of its layers is of an unsupported kind.
        CompressionStateError: An interrupted forward has filled some of its layers.
    """
    works = "use DynamicCache() or StaticCache(config, max_cache_len)"
    if not hasattr(cache, "layers"):
        raise UnsupportedModelError(
            f"{type(cache).__name__} is not supported under compression; {works}"
        )
    if getattr(cache, "offloading", False):
        raise UnsupportedModelError(
            f"an offloaded KV cache is not supported under compression; {works}"
        )
    kinds = (DynamicLayer, StaticLayer, CompressedDynamicLayer, CompressedStaticLayer)
    replicate = getattr(cache, "layer_class_to_replicate", None)
    for kind in {type(layer) for layer in cache.layers} | ({replicate} if replicate else set()):
        if kind not in kinds:
            raise UnsupportedModelError(
                f"cache layers of kind {kind.__name__} are not supported under compression; {works}"
            )
    _check_whole(cache, num_layers)


def _check_whole(cache: Cache, num_layers: int) -> None:
    """Refuse a growing cache that a forward has filled in part: its layers disagree from there."""
    layers = cache.layers
    if not layers or isinstance(layers[0], StaticLayer):  # whose lengths would wait for the device
        return
    first, last = (int(layer.get_seq_length()) for layer in (layers[0], layers[-1]))
    last = last if len(layers) >= num_layers else 0
    if first != last:
        raise CompressionStateError(
            f"this KV cache holds a part of an interrupted forward (layer 0 {first} tokens, layer "
            f"{num_layers - 1} {last}); start with a new cache"
        )


def layer_at(cache: Cache, index: int) -> CacheLayerMixin:
    """The cache's layer, made if the cache makes its layers lazily."""
    while len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    return cache.layers[index]


def physical_length(layer: CacheLayerMixin) -> int:
    """Slots in use, compressed or not."""
    return (
        layer.physical if isinstance(layer, CompressedLayerMixin) else int(layer.get_seq_length())
    )


def upgrade(cache: Cache, index: int, slots: Slots) -> CompressedLayerMixin:
    """Replace layer `index` in place by its compressed twin; `slots` describe what it holds now."""
    layer = cache.layers[index]
    new: CompressedLayerMixin
    if isinstance(layer, StaticLayer):
        new = CompressedStaticLayer.upgrade(layer, slots)
    else:
        assert isinstance(layer, DynamicLayer)
        new = CompressedDynamicLayer.upgrade(layer, slots)
    cache.layers[index] = new
    return new


def kv_bytes(cache: Cache | None) -> int:
    """Bytes of keys and values held by a cache, padding slots included."""
    layers = [] if cache is None else cache.layers
    total = 0
    for layer in layers:
        for tensor in (layer.keys, layer.values):
            total += 0 if tensor is None else tensor.numel() * tensor.element_size()
    return total
