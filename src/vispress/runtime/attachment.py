"""Attach compressors to a model instance: hooks in, hooks out, nothing left behind."""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vispress.adapters.base import Modality, ModelAdapter
from vispress.errors import CompressionStateError
from vispress.kinds import ATTENTION_SIGNALS, ENCODER_SIGNALS, Signal
from vispress.methods.base import Compressor
from vispress.runtime.encoder.capture import (
    CAPTURE_ATTRIBUTE,
    EncoderCapture,
    EncoderSink,
    watch_pixels,
)
from vispress.runtime.encoder.hooks import Merging
from vispress.runtime.forward import prefill
from vispress.runtime.forward.attention_reads import attention_layers
from vispress.runtime.forward.model_call import (
    LATEST,
    MODEL_CALLS,
    SIZES,
    ModelCall,
    brings_images,
    by_name,
    capture_of,
)
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.forward.static_decode import StaticDecodeCall
from vispress.runtime.hooks.attention import _SINK, current_sink, watch, watching
from vispress.runtime.hooks.instance_patch import Original, forget, patch_instance
from vispress.runtime.stages.decode import DecodeStep
from vispress.runtime.stages.encoder import EncoderStep
from vispress.runtime.stages.mask import PairStep
from vispress.runtime.stages.probe import STATE
from vispress.runtime.stages.select import BoundPlacement
from vispress.runtime.stages.skip import leave
from vispress.runtime.tokens.live_tokens import live_deepstack
from vispress_kernels import Backend

ATTRIBUTE = "_vispress_attachment"


class Attachment:
    """Compressors on one model: what is attached, and how to take it off again.

    Args:
        adapter: Knows the model.
        methods: The chain of compressors.
        steps: Their placements in the order they act.
        notes: Remarks for reports.
        backend: Kernel backend.
        encoder_step: The placement in the encoder, if there is one.
        decode_step: The placement in decoding, likewise.
        pair_step: The placement that masks pairs, likewise.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        methods: Sequence[Compressor],
        steps: Sequence[BoundPlacement],
        notes: Sequence[str],
        backend: Backend,
        encoder_step: EncoderStep | None = None,
        decode_step: DecodeStep | None = None,
        pair_step: PairStep | None = None,
    ) -> None:
        self.backend: Backend = backend
        self.adapter, self.methods, self.steps, self.notes = adapter, methods, steps, tuple(notes)
        self.record: Any = None
        self._undo: list[Callable[[], None]] = []
        self.decode_step, self.pair_step = decode_step, pair_step
        self.encoder_step, self.merging = encoder_step, Merging(adapter, encoder_step, backend)
        self.readers = [one for method in methods for one in method.views() or (method,)]
        wanted = frozenset().union(*(method.signals() for method in methods))
        self.encoder_signals = wanted & ENCODER_SIGNALS
        self._decoder = (adapter.language_model, *adapter.decoder_layers)
        self.reads_encoder_late = any(
            step.placement.layer > 0 and step.method.signals() & self.encoder_signals
            for step in steps
        )
        self.reads_input = Signal.INPUT_EMBEDDINGS in wanted
        self.reads_text = Signal.TEXT_EMBEDDINGS in wanted
        self.steps_at: dict[int, list[BoundPlacement]] = {}
        for step in steps:
            self.steps_at.setdefault(step.placement.layer, []).append(step)

    def encoder_layers(self, method: Compressor, signal: Signal) -> tuple[int, ...]:
        """Encoder layers that `method` reads; of column attention, those that can be compared."""
        layers = method.encoder_layers(
            len(self.adapter.encoder_attentions()), self.adapter.feature_layer()
        )
        if signal is Signal.COLUMN_ATTENTION:
            comparable = set(self.adapter.global_layers())
            layers = tuple(layer for layer in layers if layer in comparable)
        return layers or (self.adapter.feature_layer(),)

    def all_encoder_layers(self) -> tuple[int, ...]:
        """Every encoder layer that must be watched, ascending."""
        layers: set[int] = set()
        for method in self.readers:
            for signal in method.signals() & ATTENTION_SIGNALS:
                layers |= set(self.encoder_layers(method, signal))
        return tuple(sorted(layers))

    def key_layers(self) -> set[int]:
        """Encoder layers whose keys are read."""
        return {
            self.encoder_layers(method, Signal.VISION_KEYS)[-1]
            for method in self.readers
            if Signal.VISION_KEYS in method.signals()
        }

    def attach(self) -> None:
        """Install all hooks."""
        adapter, base = self.adapter, self.adapter.base
        self._hook(base.register_forward_pre_hook(self._base_starts, with_kwargs=True))
        self._hook(base.register_forward_hook(self._base_ends, always_call=True))
        for modality in adapter.placeholders():
            self._wrap(base, f"get_{modality}_features", self._get_features, modality)
        language_model: Any = adapter.language_model
        pre, post = self._language_model_starts, self._language_model_ends
        self._hook(language_model.register_forward_pre_hook(pre, with_kwargs=True))
        self._hook(language_model.register_forward_hook(post, with_kwargs=True, always_call=True))
        for number, layer in enumerate(adapter.decoder_layers):
            starts = partial(self._layer_starts, number)
            self._hook(layer.register_forward_pre_hook(starts, with_kwargs=True))
            if any(s.placement.layer <= number < (s.placement.until or 0) for s in self.steps):
                # before transformers' own hook, which collects hidden states
                self._hook(layer.register_forward_hook(leave, always_call=True, prepend=True))
        placements = [step.placement for step in self.steps]
        read = {layer for one in placements for layer in attention_layers(one)}
        if self.decode_step is not None:
            read.add(self.decode_step.reads)
        if self.pair_step is not None:
            read |= set(range(self.pair_step.first, len(adapter.decoder_layers)))
        for number in read:
            self._undo.append(watch(adapter.decoder_layers[number].self_attn))  # type: ignore[arg-type]
        for number in {layer for one in placements for layer in one.transitions}:
            self._measure(number)
        self._attach_encoder()
        if hasattr(language_model, "_deepstack_process"):
            self._wrap(language_model, "_deepstack_process", self._deepstack)
        self._set(base, ATTRIBUTE, self)

    def _attach_encoder(self) -> None:
        modules = self.adapter.encoder_attentions()
        for layer in {*self.all_encoder_layers(), *self.key_layers()}:
            self._undo.append(watch(modules[layer]))
        self._undo += self.merging.install()
        if Signal.VISION_FEATURES in self.encoder_signals:
            self._hook(self.adapter.projector.register_forward_pre_hook(self._projector_starts))
        if Signal.PADDING in self.encoder_signals:
            self._undo += watch_pixels(self.adapter)

    def detach(self) -> None:
        """Take everything off again, in reverse order."""
        while self._undo:
            self._undo.pop()()

    def _hook(self, handle: Any) -> None:
        self._undo.append(handle.remove)

    def _set(self, module: nn.Module, name: str, value: Any) -> None:
        module.__dict__[name] = value
        self._undo.append(partial(forget, module, name))

    def _wrap(self, module: Any, name: str, wrapper: Callable[..., Any], *args: Any) -> None:
        """Shadow a bound method on the instance (never on the class)."""
        if hasattr(module, name):
            self._undo.append(patch_instance(module, name, partial(wrapper, *args)))

    def _measure(self, number: int) -> None:
        layer: Any = self.adapter.decoder_layers[number]
        for module, sub in enumerate((layer.self_attn, layer.mlp)):
            hook = partial(self._module_ran, number, module)
            self._hook(sub.register_forward_hook(hook, with_kwargs=True))

    def _base_starts(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() and not brings_images(kwargs):
            return  # a compiled decode step: nothing to remember, nothing that breaks the graph
        now = (self.adapter.language_model, *self.adapter.decoder_layers)
        if len(now) != len(self._decoder) or any(
            a is not b for a, b in zip(now, self._decoder, strict=True)
        ):
            raise CompressionStateError(
                "decoder layers were exchanged after compress_model: nothing would be compressed; "
                "call remove_compression(model) and compress again"
            )
        call = ModelCall(self, by_name(type(module).forward, (module, *args), kwargs))
        if brings_images(call.arguments):
            call.fetch()
        for modality, output in (call.arguments.get("mm_encoder_outputs") or {}).items():
            if output is not None:
                call.captures[modality] = capture_of(self, modality, output)
        MODEL_CALLS.set((*MODEL_CALLS.get(), call))

    def _base_ends(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if (calls := MODEL_CALLS.get()) and calls[-1].attachment is self:
            MODEL_CALLS.set(calls[:-1])

    def _current(self) -> ModelCall | None:
        calls = MODEL_CALLS.get()
        return calls[-1] if calls and calls[-1].attachment is self else None

    def _get_features(
        self, modality: Modality, original: Original, *args: Any, **kwargs: Any
    ) -> Any:
        if isinstance(current_sink(), EncoderSink):  # Qwen's video method calls the image method
            return original(*args, **kwargs)
        sink = EncoderSink(
            self.adapter,
            self.encoder_signals,
            self.all_encoder_layers(),
            self.key_layers(),
            self.backend,
        )
        arguments, call = by_name(original.function, args, kwargs), self._current()
        if isinstance(sizes := arguments.get(SIZES), Tensor):
            arguments[SIZES] = sizes.cpu() if call is None else call.on_host(sizes)
        with watching(sink), self.merging.call(modality, arguments) as merge:
            output = original(*args, **kwargs)
        features = self.adapter.features(modality, output)
        capture = EncoderCapture(self.adapter, modality, features, arguments, sink, merge)
        if not isinstance(output, tuple | list | Tensor):
            setattr(output, CAPTURE_ATTRIBUTE, capture)
            LATEST.set(dict(LATEST.get()) | {(id(self), modality): weakref.ref(capture)})
        if call is not None:
            call.captures[modality] = capture
            capture.transient = True
        return output

    def _projector_starts(self, module: nn.Module, args: Any) -> None:
        sink = current_sink()
        if isinstance(sink, EncoderSink):
            sink.projector_input = args[0]

    def _language_model_starts(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not args and (step := StaticDecodeCall.of(self, kwargs)) is not None:
            return args, kwargs | {STATE: step}
        call = self._current() or ModelCall(self, {})
        state, kwargs = prefill.begin(self, call, module, args, kwargs)
        if state is None:
            return None
        state.sink = _SINK.set(state)
        return (), kwargs | {STATE: state}

    def _language_model_ends(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        state = kwargs.get(STATE)
        if not isinstance(state, ForwardState):
            return None
        if state.sink is not None:
            _SINK.reset(state.sink)
            state.sink = None
        if output is None:  # the forward raised
            return None
        return prefill.finish(self, state, output)

    def _layer_starts(self, number: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if STATE not in kwargs:
            return None
        kwargs = dict(kwargs)
        state: ForwardState | StaticDecodeCall = kwargs.pop(STATE)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if isinstance(state, StaticDecodeCall):
            return (hidden, *args[1:]), state.layer_kwargs(number, hidden, kwargs)
        hidden, kwargs = prefill.enter_layer(state, number, module, hidden, kwargs)
        return (hidden, *args[1:]), kwargs

    @torch.no_grad()
    def _module_ran(
        self, number: int, part: int, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        state = current_sink()
        if isinstance(state, ForwardState) and state.attachment is self and state.mode == "run":
            x = args[0] if args else kwargs["hidden_states"]
            prefill.measure(
                state, number, part, x, output[0] if isinstance(output, tuple) else output
            )

    def _deepstack(
        self, original: Original, hidden: Tensor, visual: Tensor, embeds: Tensor
    ) -> Tensor:
        """Qwen3-VL adds early encoder features between layers: hand it the rows that still live."""
        state = current_sink()
        if isinstance(state, ForwardState) and state.attachment is self and not state.untouched:
            visual, embeds = live_deepstack(state.last, hidden.device, visual, embeds, self.backend)
        result: Tensor = original(hidden, visual, embeds)
        return result
