"""A user's cache: which kinds of layers work, their compressed twins, what methods left in it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from vispress.errors import CompressionStateError, ConfigError, UnsupportedModelError
from vispress.methods.base import Compressor
from vispress.runtime.kv_cache.dynamic import (
    CompressedDynamicLayer,
    ForgettingLayer,
    ForgettingSlidingLayer,
)
from vispress.runtime.kv_cache.hf_compat import GROWING_LAYERS_FORGET, LINEAR_LAYERS
from vispress.runtime.kv_cache.sliding import CompressedSlidingLayer
from vispress.runtime.kv_cache.slots import CompressedLayerMixin, Slots
from vispress.runtime.kv_cache.static import CompressedStaticLayer

_KINDS = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    ForgettingLayer,
    ForgettingSlidingLayer,
    CompressedDynamicLayer,
    CompressedSlidingLayer,
    CompressedStaticLayer,
    *LINEAR_LAYERS,
)
_FORGETTING: dict[type[CacheLayerMixin], type[ForgettingLayer]] = (
    {}
    if GROWING_LAYERS_FORGET
    else {DynamicLayer: ForgettingLayer, DynamicSlidingWindowLayer: ForgettingSlidingLayer}
)

_ATTRIBUTE: Final = "_vispress_remembering"
_HALFWAY: Final = "_vispress_halfway"
"""Attribute of a cache whose linear-attention states a forward has changed, and not ended."""


@dataclass(frozen=True)
class Remembering:
    """Methods for which a cache layer remembers more than keys, values and their places.

    Equal by value, so that copies of a model and of its caches go together.

    Args:
        methods: In the order of their stages.
    """

    methods: tuple[Compressor, ...] = ()

    def begin(self, cache: Cache) -> None:
        """Note in a cache that a prefill of this plan is stored in it."""
        if self.methods or hasattr(cache, _ATTRIBUTE):  # a static cache may be reset and used again
            setattr(cache, _ATTRIBUTE, self)

    def check(self, cache: Any) -> None:
        """Refuse to go on from a cache in which another plan's methods remember.

        Raises:
            CompressionStateError: Says what would work.
        """
        held = getattr(cache, _ATTRIBUTE, None)
        if held is None or held is self or held == self or not held.methods:
            return
        now = ", ".join(map(str, self.methods)) or "no method that does"
        raise CompressionStateError(
            f"this KV cache was filled under {', '.join(map(str, held.methods))}, which goes on "
            f"acting while decoding, and the model is compressed by {now}: set it back by "
            "update_compression, or start with a new cache"
        )


def is_compressed(cache: Cache | None) -> bool:
    """Tell whether some layer of the cache was filled by a compressed prefill."""
    return cache is not None and any(
        isinstance(layer, CompressedLayerMixin) for layer in getattr(cache, "layers", ())
    )


def holds_padding(cache: Cache | None) -> bool:
    """Tell whether a compressed cache was filled under a mask that hid tokens."""
    return cache is not None and any(
        isinstance(layer, CompressedLayerMixin) and layer.padded
        for layer in getattr(cache, "layers", ())
    )


def refuse_shown_padding(padded: bool) -> None:
    """Refuse a call whose mask shows all tokens, if some were hidden when the cache was filled.

    Raises:
        ConfigError: Says which mask is right.
    """
    if padded:
        raise ConfigError(
            "the KV cache was filled under an attention_mask with padding, which is not stored and "
            "cannot be shown later, as this call does (by ones, or without a mask); give the mask "
            "of the whole conversation"
        )


def note_states(cache: Cache | None, *, halfway: bool) -> None:
    """Note that a forward changes the states of a cache, or that it has ended."""
    if cache is None:
        return
    if halfway:
        setattr(cache, _HALFWAY, True)
    else:
        cache.__dict__.pop(_HALFWAY, None)


def expect_nothing(cache: Cache | None) -> None:
    """Take back what layers of a cache expect of a call that was interrupted."""
    for layer in [] if cache is None else getattr(cache, "layers", ()):
        if isinstance(layer, CompressedLayerMixin):
            layer.expect_nothing()


def check_cache(cache: Cache, windows: Sequence[int | None], linear: Collection[int] = ()) -> None:
    """Refuse, by name, cache kinds whose rows the runtime cannot keep short.

    Args:
        cache: The cache.
        windows: Positions that each decoder layer sees; None for all.
        linear: Decoder layers that have a state in place of keys and values.

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
    replicate = getattr(cache, "layer_class_to_replicate", None)
    for kind in {type(layer) for layer in cache.layers} | ({replicate} if replicate else set()):
        if kind is StaticSlidingWindowLayer:
            raise UnsupportedModelError(
                "a static cache of a model with sliding windows (StaticSlidingWindowLayer) is not "
                "supported under compression; use DynamicCache(), or DynamicCache(config=...), "
                "whose layers hold what their windows see"
            )
        if kind not in _KINDS:
            raise UnsupportedModelError(
                f"cache layers of kind {kind.__name__} are not supported under compression; {works}"
            )
    kinds = [isinstance(layer, LINEAR_LAYERS) for layer in cache.layers[: len(windows)]]
    if linear and kinds != [number in linear for number in range(len(windows))]:
        raise UnsupportedModelError(
            "this KV cache has not the kinds of layers that the model has (some with linear "
            "attention); use DynamicCache(config=model.config.get_text_config())"
        )
    for number, (layer, window) in enumerate(zip(cache.layers, windows, strict=False)):
        held = getattr(layer, "sliding_window", None)
        if held is not None and (window is None or held < window):
            sees = "everything" if window is None else f"{window} positions"
            raise UnsupportedModelError(
                f"cache layer {number} ({type(layer).__name__}) holds {held} positions, and "
                f"decoder layer {number} sees {sees}; use DynamicCache(), or "
                "DynamicCache(config=...) with the config of this model"
            )
    _check_whole(cache, len(windows))


def _check_whole(cache: Cache, num_layers: int) -> None:
    """Refuse a growing cache that a forward has filled in part: its layers disagree from there.

    Raises:
        CompressionStateError: Names both lengths.
    """
    layers = [layer for layer in cache.layers if isinstance(layer, CacheLayerMixin)]
    if getattr(cache, _HALFWAY, False) and any(
        any(layer.has_previous_state.values()) for layer in cache.layers if layer not in layers
    ):
        raise CompressionStateError(
            "this KV cache holds a part of an interrupted forward, in the states of layers with "
            "linear attention; start with a new cache"
        )
    if not layers or isinstance(layers[0], StaticLayer):  # whose lengths would wait for the device
        return
    first, last = (int(layer.get_seq_length()) for layer in (layers[0], layers[-1]))
    last = last if len(cache.layers) >= num_layers else 0
    if first != last:
        raise CompressionStateError(
            f"this KV cache holds a part of an interrupted forward (layer 0 {first} tokens, layer "
            f"{num_layers - 1} {last}); start with a new cache"
        )


def layer_at(cache: Cache, index: int) -> CacheLayerMixin:
    """Give the cache's layer, made if the cache makes its layers lazily."""
    while len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    return cache.layers[index]


def slots_ahead(layer: CacheLayerMixin) -> int:
    """Count the slots that a layer will hand to attention ahead of a chunk's, compressed or not."""
    if isinstance(layer, CompressedLayerMixin):
        return layer.physical
    if isinstance(layer, DynamicSlidingWindowLayer):  # it may hold more, to be cropped
        return int(layer.get_mask_sizes(0)[0])
    return int(layer.get_seq_length())


def compressed_twin(layer: DynamicLayer, slots: Slots) -> CompressedDynamicLayer:
    """Take over the keys and values of a plain growing layer; `slots` describe them."""
    new = CompressedDynamicLayer()
    new.__dict__.update(layer.__dict__)
    new.slots, new.pending = slots, None
    return new


def upgrade(cache: Cache, index: int, slots: Slots) -> CompressedLayerMixin:
    """Replace layer `index` in place by its compressed twin; `slots` describe what it holds now."""
    layer = cache.layers[index]
    new: CompressedLayerMixin
    if isinstance(layer, StaticLayer):
        new = CompressedStaticLayer.upgrade(layer, slots)
    elif isinstance(layer, DynamicSlidingWindowLayer):
        new = CompressedSlidingLayer.upgrade(layer, slots)
    else:
        assert isinstance(layer, DynamicLayer)
        new = compressed_twin(layer, slots)
    cache.layers[index] = new
    _let_forget(cache)
    return new


def _let_forget(cache: Cache) -> None:
    """Let `reset` empty the plain growing layers too, so that all stay as long as each other."""
    for index, layer in enumerate(cache.layers):
        if (kind := _FORGETTING.get(type(layer))) is not None:
            new = kind.__new__(kind)
            new.__dict__.update(layer.__dict__)
            cache.layers[index] = new
    replicate = cache.layer_class_to_replicate
    cache.layer_class_to_replicate = _FORGETTING.get(replicate, replicate)


def kv_bytes(cache: Cache | None) -> int:
    """Count the bytes of keys and values held by a cache, padding slots included."""
    layers = [] if cache is None else cache.layers
    total = 0
    for layer in layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            total += 0 if tensor is None else tensor.numel() * tensor.element_size()
    return total
