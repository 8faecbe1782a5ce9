"""Run the base model's forward, and the encoder calls in it, and remember what they were given."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vispress.adapters.base import Modality
from vispress.errors import CompressionStateError
from vispress.prompts import PROMPT_LENGTHS, as_lengths
from vispress.runtime.encoder.capture import CAPTURE_ATTRIBUTE, EncoderCapture, EncoderSink
from vispress.runtime.encoder.feature_choice import check_choice_of_features
from vispress.runtime.encoder.merging import EncoderMerge
from vispress.runtime.encoder.pooling import EncoderPool
from vispress.runtime.forward.layer_patch import refuse_passed_by
from vispress.runtime.forward.merged_features import note_merged, takes_embeds
from vispress.runtime.forward.model_call import (
    MODEL_CALLS,
    SIZES,
    ModelCall,
    brings_images,
    by_name,
    capture_of,
    remember,
)
from vispress.runtime.forward.owner import GENERATING, is_traced, prompt_ends
from vispress.runtime.hooks.attention import current_sink, watching
from vispress.runtime.hooks.compiling import (
    between,
    is_tracing,
    outside,
    refuse_export,
    refuse_trace,
)
from vispress.runtime.hooks.instance_patch import Original
from vispress.runtime.kv_cache.cache_layers import expect_nothing
from vispress.runtime.kv_cache.hf_compat import cache_of
from vispress.runtime.plan.plan import Plan
from vispress.runtime.stages.base import RuntimeStage


def current_call(plan: Plan) -> ModelCall | None:
    """Give the base model's call that runs in this context."""
    calls = MODEL_CALLS.get()
    return calls[-1] if calls and calls[-1].plan is plan else None


def run_base(
    plan: Plan,
    decoder: tuple[nn.Module, ...],
    original: Original,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    told: set[str],
) -> Any:
    """Run the base model's forward with an entry in `MODEL_CALLS`.

    Args:
        plan: What is asked of the model.
        decoder: The language model and its layers, as they were when it was compressed.
        original: The forward.
        args: Its positional arguments.
        kwargs: Its keyword arguments, and perhaps `prompt_lengths`.
        told: What the model's user was warned of; grows.

    Raises:
        CompressionStateError: The decoder's layers are others now, or have another forward.
        ConfigError: The prompt lengths do not fit.
    """
    lengths = kwargs.pop(PROMPT_LENGTHS, None)
    call = (plan, decoder, args, kwargs, lengths, told)
    if not torch.compiler.is_compiling():
        if is_tracing():
            refuse_trace()
        return _run(plan, original, partial(_prepare, *call))
    refuse_export()
    if is_traced(args, kwargs) and not takes_embeds(kwargs):
        return original(*args, **kwargs)
    return _RUN_BETWEEN(plan, original, partial(_PREPARE_OUTSIDE, *call))


def _run(
    plan: Plan,
    original: Original,
    prepare: Callable[[], tuple[ModelCall, Sequence[Any], dict[str, Any]]],
) -> Any:
    call, args, kwargs = prepare()
    # a base model is not called inside itself: an entry of its own would be a dead call's
    before = tuple(other for other in MODEL_CALLS.get() if other.plan is not plan)
    # a hook behind the forward would not do: torch runs it on `Exception` alone
    try:
        MODEL_CALLS.set((*before, call))
        return original(*args, **kwargs)
    except BaseException:
        expect_nothing(cache_of(call.arguments))
        raise
    finally:
        MODEL_CALLS.set(before)


def _prepare(
    plan: Plan,
    decoder: tuple[nn.Module, ...],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    lengths: Any,
    told: set[str],
) -> tuple[ModelCall, Sequence[Any], dict[str, Any]]:
    """Give the entry of a call, and what the forward is to be called with."""
    adapter = plan.adapter
    now = (adapter.language_model, *adapter.decoder_layers)
    if now != decoder:  # modules are equal where they are the same
        raise CompressionStateError(
            "decoder layers were exchanged after compress_model: nothing would be compressed; "
            "call remove_compression(model) and compress again"
        )
    refuse_passed_by(decoder[1:])
    base = adapter.base
    call = ModelCall(plan, by_name(type(base).forward, (base, *args), kwargs))
    given = None if lengths is None else as_lengths(lengths)
    call.labels, call.shift_labels, call.prompt_lengths = prompt_ends(base, given, call.rows)
    generating = GENERATING.get()
    if generating is not None and generating.base is base:
        call.chunks = generating.chunks
    if call.chunks is not None and call.chunks.running is not None:
        return call, args, kwargs
    # ahead of the prompt's lengths: a chunk of a prompt is refused as what it is
    for modality, output in (call.arguments.get("mm_encoder_outputs") or {}).items():
        if output is not None:
            call.captures[modality] = capture_of(plan, modality, output)
    if brings_images(call.arguments):
        call.fetch()
    elif takes_embeds(call.arguments):
        both = call.arguments.get("input_ids") is not None
        note_merged(plan, call, told)
        if both and call.captures:  # transformers wants one of them
            told_apart = ("self", "input_ids")
            args, kwargs = (), {k: v for k, v in call.arguments.items() if k not in told_apart}
    return call, args, kwargs


_RUN_BETWEEN, _PREPARE_OUTSIDE = between(_run), outside(_prepare)


def run_encoder(
    plan: Plan,
    stages: Sequence[RuntimeStage],
    modality: Modality,
    original: Original,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """Run `get_image_features` or `get_video_features`, and keep the signals that it shows."""
    call = (plan, stages, modality, original, args, kwargs)
    if not torch.compiler.is_compiling():
        return _encode(_before_encoder, _behind_encoder, *call)
    if plan.encoder_signals or any(stage.encode is not None for stage in stages):
        # what is read or changed in there is found by context, which a graph cannot look into
        return _ENCODE_OUTSIDE(_before_encoder, _behind_encoder, *call)
    return _ENCODE_BETWEEN(_BEFORE_OUTSIDE, _BEHIND_OUTSIDE, *call)


def _encode(
    before: Callable[..., tuple[dict[str, Any], ModelCall | None, EncoderSink | None]],
    behind: Callable[..., None],
    plan: Plan,
    stages: Sequence[RuntimeStage],
    modality: Modality,
    original: Original,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    arguments, call, sink = before(plan, original, args, kwargs)
    if sink is None:
        return original(*args, **kwargs)
    with watching(sink), _encoding(stages, modality, arguments) as merge:
        output = original(*args, **kwargs)
    behind(plan, call, modality, arguments, output, sink, merge)
    return output


def _before_encoder(
    plan: Plan, original: Original, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], ModelCall | None, EncoderSink | None]:
    """Give the arguments by name, the base model's call, and what collects signals."""
    if isinstance(current_sink(), EncoderSink):  # Qwen's video method calls the image method
        return {}, None, None
    signals, layers = plan.encoder_signals, plan.all_encoder_layers
    sink = EncoderSink(plan.adapter, signals, layers, plan.key_layers, plan.backend)
    arguments, call = by_name(original.function, args, kwargs), current_call(plan)
    check_choice_of_features(plan.adapter, plan.feature_choice, arguments, plan.encoder_readers)
    if isinstance(sizes := arguments.get(SIZES), Tensor):
        arguments[SIZES] = sizes.cpu() if call is None else call.on_host(sizes)
    return arguments, call, sink


def _behind_encoder(
    plan: Plan,
    call: ModelCall | None,
    modality: Modality,
    arguments: Mapping[str, Any],
    output: Any,
    sink: EncoderSink,
    merge: EncoderMerge | EncoderPool | None,
) -> None:
    """Keep what the encoder gave and showed."""
    features = plan.adapter.features(modality, output)
    capture = EncoderCapture(plan.adapter, modality, features, arguments, sink, merge)
    capture.asked = plan.asked_of_encoder
    if not isinstance(output, tuple | list | Tensor):
        setattr(output, CAPTURE_ATTRIBUTE, capture)
        remember(plan, capture)
    if call is not None:
        call.captures[modality] = capture
        capture.transient = True


_ENCODE_OUTSIDE, _ENCODE_BETWEEN = outside(_encode), between(_encode)
_BEFORE_OUTSIDE = outside(_before_encoder)
_BEHIND_OUTSIDE = outside(_behind_encoder)


@contextmanager
def _encoding(
    stages: Sequence[RuntimeStage], modality: Modality, arguments: dict[str, Any]
) -> Iterator[Any]:
    """Let the stage that acts in the encoder, if there is one, act in this call of it."""
    encode = next((stage.encode for stage in stages if stage.encode is not None), None)
    if encode is None:
        yield None
    else:
        with encode(modality, arguments) as merge:
            yield merge
