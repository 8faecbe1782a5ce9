"""What one call of `get_image_features` or `get_video_features` showed: features and signals."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vispress.adapters.base import Modality, ModelAdapter
from vispress.methods.base import upcast
from vispress.precision import full_precision
from vispress.runtime.encoder.merging import EncoderMerge
from vispress.runtime.encoder.patch_attention import patch_attention
from vispress.runtime.encoder.pooling import EncoderPool
from vispress.runtime.encoder.sequences import bounds_of
from vispress.runtime.hooks.attention import Softmax, attention_rows, current_sink
from vispress.types import CropLayout, Signal
from vispress_kernels import Backend
from vispress_kernels.column_attention import column_attention
from vispress_kernels.query_attention import query_attention

CAPTURE_ATTRIBUTE = "_vispress_capture"


class EncoderSink:
    """Collects what the asked signals need while the vision encoder runs.

    Args:
        adapter: The family.
        wanted: Signals to collect.
        layers: Encoder layers whose attention is read.
        key_layers: Encoder layers whose keys are read.
        backend: Kernels to use.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        wanted: frozenset[Signal],
        layers: Sequence[int],
        key_layers: Collection[int],
        backend: Backend,
    ) -> None:
        self._modules = adapter.encoder_attentions()
        self._has_cls, self._packed = adapter.has_cls, adapter.packed
        self._wanted = wanted
        self._layers, self._key_layers, self._backend = layers, key_layers, backend
        self.attention: dict[tuple[Signal, int], list[Tensor]] = {}
        self.keys: dict[int, list[Tensor]] = {}
        self.projector_input: Tensor | None = None
        self.padding: Tensor | None = None

    @property
    def asked(self) -> tuple[Any, ...]:
        """Name what is collected, empty for nothing; who asks the same collects the same."""
        if not self._wanted:
            return ()
        layers, keys = tuple(self._layers), tuple(sorted(self._key_layers))
        return self._wanted, layers, keys, self._backend

    @torch.no_grad()
    def collected(self) -> tuple[Any, ...]:
        """Copies of all that was collected, as another sink's `fill` takes them."""
        attention = {at: [part.clone() for part in parts] for at, parts in self.attention.items()}
        keys = {at: [part.clone() for part in parts] for at, parts in self.keys.items()}
        rows = self.projector_input
        return attention, keys, None if rows is None else rows.detach().clone(), self.padding

    def fill(self, collected: tuple[Any, ...]) -> None:
        """Take what another sink that was asked the same collected of the same images."""
        self.attention, self.keys, self.projector_input, self.padding = collected

    @torch.no_grad()
    def observe(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> None:
        """Called by a watched encoder attention, once a layer or once an image and layer."""
        layer = next((i for i, known in enumerate(self._modules) if known is module), None)
        if layer is not None and layer in self._layers:
            # varlen kernels get all images in one packed sequence; elsewhere the keyword is what
            # the caller told the language model, handed on by the base model
            config: Any = module.config
            bounds = bounds_of(mask) if self._packed else None
            if self._packed and "flash" in str(config._attn_implementation):
                bounds = kwargs.get("cu_seq_lens_q")
            self._attention(layer, query, key, float(kwargs["scaling"]), bounds)
        if layer is not None and layer in self._key_layers:
            self.keys.setdefault(layer, []).append(key[:, :, 1:] if self._has_cls else key)

    def _attention(
        self, layer: int, query: Tensor, key: Tensor, scaling: float, bounds: Tensor | None
    ) -> None:
        if Signal.CLS_ATTENTION in self._wanted:
            row = query_attention(query[:, :, :1], key, scale=scaling, backend=self._backend)
            self.attention.setdefault((Signal.CLS_ATTENTION, layer), []).append(row[:, :, 0, 1:])
        if Signal.CLS_LOGITS in self._wanted:
            logits = upcast(query[:, :, :1]) @ upcast(key).mT * scaling
            self.attention.setdefault((Signal.CLS_LOGITS, layer), []).append(logits[:, :, 0, 1:])
        if Signal.CLS_WIDE_ATTENTION in self._wanted:
            cls, wide = (x.transpose(1, 2).flatten(2)[:, None] for x in (query[:, :, :1], key))
            row = attention_rows(cls, wide, None, Softmax(wide.shape[-1] ** -0.5))[:, :, 0, 1:]
            self.attention.setdefault((Signal.CLS_WIDE_ATTENTION, layer), []).append(row)
        if Signal.PATCH_ATTENTION in self._wanted:
            mean = patch_attention(query, key, scaling, bounds, int(self._has_cls), self._backend)
            self.attention.setdefault((Signal.PATCH_ATTENTION, layer), []).append(mean)
        if Signal.COLUMN_ATTENTION in self._wanted:
            mean = column_attention(
                query, key, cu_seqlens=bounds, scale=scaling, backend=self._backend
            )
            mean = mean[..., 1:] if self._has_cls else mean
            self.attention.setdefault((Signal.COLUMN_ATTENTION, layer), []).append(mean)


def watch_projector(adapter: ModelAdapter) -> Callable[[], None]:
    """Let sinks see what the projector is called with; gives what undoes it."""

    def starts(module: nn.Module, args: Any) -> None:
        sink = current_sink()
        if isinstance(sink, EncoderSink):
            sink.projector_input = args[0]

    return adapter.projector.register_forward_pre_hook(starts).remove


def watch_pixels(adapter: ModelAdapter) -> list[Callable[[], None]]:
    """Let sinks look for padding in what the encoder is called with; gives what undoes it.

    Nothing is watched in families without padding.
    """

    def starts(module: nn.Module, args: Any, kwargs: Any) -> None:
        sink = current_sink()
        if isinstance(sink, EncoderSink):
            sink.padding = adapter.padding(args[0] if args else kwargs["pixel_values"])

    encoder = adapter.square_encoder()
    if encoder is None:
        return []
    return [encoder.register_forward_pre_hook(starts, with_kwargs=True).remove]


class EncoderCapture:
    """Features and signals of the images (or videos) of one encoder call.

    Args:
        adapter: The family.
        modality: Image or video.
        features: What the model will scatter into the sequence, `[N_i, D]` for each.
        call: Arguments of the call by name.
        sink: What the encoder showed.
        merge: What was merged or pooled in the encoder, or None.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        modality: Modality,
        features: Sequence[Tensor],
        call: Mapping[str, Any],
        sink: EncoderSink,
        merge: EncoderMerge | EncoderPool | None = None,
    ) -> None:
        self.modality = modality
        self.asked: object = None
        """Holds what a plan asked of the call: features are of use to plans that ask the same."""
        self.transient = False  # made inside the forward that uses it, and by nobody else
        self.counts = tuple(len(feature) for feature in features)
        self._first = features[0].detach() if features else None
        self.layouts: Sequence[tuple[tuple[int, int, int] | None, CropLayout | None]]
        self.layouts = adapter.layouts(modality, self.counts, call)
        self._signals: dict[tuple[Signal, int], tuple[Tensor, ...]] = {}
        self.encoder_tokens = () if merge is None else tuple(merge.per_image())
        """Tokens of each image ahead of the encoder, then behind each of its layers."""
        with full_precision():
            self._read(adapter, call, sink, merge)

    def _read(
        self,
        adapter: ModelAdapter,
        call: Mapping[str, Any],
        sink: EncoderSink,
        merge: EncoderMerge | EncoderPool | None,
    ) -> None:
        """Carry what the encoder showed to visual tokens."""
        modality = self.modality

        def pack(values: Tensor) -> tuple[Tensor, ...]:
            return tuple(v.reshape(len(v), -1) for v in adapter.pack(modality, values, call))

        for (signal, layer), parts in sink.attention.items():
            heads = [part.transpose(1, 2) for part in parts]  # [P, n, H]
            self._signals[signal, layer] = pack(_join(heads, adapter.packed))
        for layer, parts in sink.keys.items():
            keys = [part.transpose(1, 2).flatten(2) for part in parts]  # [P, n, H * Dh]
            self._signals[Signal.VISION_KEYS, layer] = pack(_join(keys, adapter.packed))
            self.key_heads = parts[0].shape[1]
        if sink.projector_input is not None:
            rows = adapter.projector_inputs(modality, sink.projector_input, call)
            self._signals[Signal.VISION_FEATURES, 0] = pack(rows)
        if sink.padding is not None:
            self._signals[Signal.PADDING, 0] = pack(sink.padding)
        names = None if merge is None else merge.groups()
        if names is not None:
            # pooling and joining leave a name as it is only where all have it
            both = pack(torch.cat([names, names.square()], dim=-1))
            self._signals[Signal.ENCODER_GROUPS, 0] = tuple(map(_pure_groups, both))

    def release(self) -> None:
        """Let go of the signals once no placement reads them any more."""
        if self.transient:
            self._signals.clear()

    def gave(self, features: Sequence[Tensor]) -> bool:
        """Tell whether features (possibly moved, or repeated for beams) came from this call."""
        if self._first is None or not len(features) or len(features[0]) != self.counts[0]:
            return False
        return bool(torch.equal(features[0].detach().to(self._first), self._first))

    def attention(self, signal: Signal, layers: Sequence[int], number: int) -> Tensor:
        """`[E, H, N]` (or `[H, N]` for one layer) of image `number`."""
        rows = torch.stack([self._signals[signal, layer][number].T for layer in layers])
        return rows[0] if len(layers) == 1 else rows

    def keys(self, layer: int, number: int) -> Tensor:
        """`[Hv, N, Dh]` of image `number`, from an encoder layer."""
        flat = self._signals[Signal.VISION_KEYS, layer][number]
        return flat.view(len(flat), self.key_heads, -1).transpose(0, 1)

    def padding(self, number: int) -> Tensor:
        """`[N]` of image `number`, of a family with a `square_encoder`."""
        return self._signals[Signal.PADDING, 0][number][:, 0]

    def encoder_groups(self, number: int) -> Tensor | None:
        """`[N]` group of each token of image `number`; None when nothing was merged."""
        groups = self._signals.get((Signal.ENCODER_GROUPS, 0))
        return None if groups is None else groups[number]

    def vision_features(self, number: int) -> Tensor:
        """`[N, Dv]` of image `number`."""
        return self._signals[Signal.VISION_FEATURES, 0][number]


def _pure_groups(both: Tensor) -> Tensor:
    """Group of each token from the means of names and their squares; mixtures are their own."""
    name, square = both.unbind(-1)
    spread = square - name.square()
    pure = (name > 0.5) & (spread.abs() < 1e-3)
    return torch.where(
        pure, name.round(), -1.0 - torch.arange(len(name), device=name.device)
    ).long()


def _join(parts: Sequence[Tensor], packed: bool) -> Tensor:
    """`[P, n, C]`, or `[S, C]` when the encoder runs its images one by one in a packed sequence."""
    if packed:
        return torch.cat([part.flatten(0, 1) for part in parts], dim=0)
    return torch.cat(list(parts), dim=0)


def projector_function(adapter: ModelAdapter) -> Callable[[Tensor], Tensor]:
    """The projector, computing in the dtype of its input, or as autocast has it where that is on.

    Weights that cannot be cast (quantised or offloaded) are used as they are, in their dtype.
    """

    def project(x: Tensor) -> Tensor:
        projector = adapter.projector
        weights = list(projector.parameters())
        own = weights[0].dtype if weights else x.dtype
        if own == x.dtype or torch.is_autocast_enabled(x.device.type):
            return adapter.project(projector, x)
        if any(w.is_meta or not w.dtype.is_floating_point for w in weights):
            floating = own if own.is_floating_point else torch.get_default_dtype()
            return adapter.project(projector, x.to(floating)).to(x.dtype)
        return adapter.project(_clone(projector, x.dtype), x)

    return project


def _clone(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A hook-free twin with cast weights; the original, maybe in use, is untouched."""
    twin = object.__new__(type(module))
    fresh = nn.Module()
    own = {
        k: v for k, v in module.__dict__.items() if k not in ("forward", "_hf_hook", "_old_forward")
    }
    twin.__dict__.update(own)
    twin.__dict__.update({k: v for k, v in fresh.__dict__.items() if "hooks" in k})
    weights: dict[str, Any] = {
        k: None if p is None else p.to(dtype) for k, p in module._parameters.items()
    }
    twin._parameters = weights  # tensors with a graph: gradients reach the original's weights
    twin._modules = {k: None if m is None else _clone(m, dtype) for k, m in module._modules.items()}
    return twin
