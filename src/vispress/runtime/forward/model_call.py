"""Remember what a base model's forward was called with: an entry a running call, by context."""

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from vispress.adapters.base import Modality
from vispress.errors import CompressionStateError
from vispress.prompts import check_ends
from vispress.runtime.encoder.capture import CAPTURE_ATTRIBUTE, EncoderCapture
from vispress.runtime.kv_cache.hf_compat import cache_of, renamed
from vispress.runtime.plan.plan import Plan


@dataclass(eq=False)
class ModelCall:
    """What the base model's forward was called with; lives as long as that call.

    Args:
        plan: What is asked of the model.
        arguments: Of the base model's forward, by name.
        captures: What the vision encoder gave in this call, or before it.
        labels: `[B, Q]` that the owner of the base model was called with, or None.
        shift_labels: `[B, Q]`, one place ahead, likewise.
        prompt_lengths: `[B]` int64 on the host (packed rows: one a document), tokens before each
            answer, padding not counted, those in the cache counted; None where nobody said.
        chunks: Of a prompt that `generate` prefills in several calls (`forward.chunks.Chunks`).
    """

    plan: Plan
    arguments: Mapping[str, Any]
    captures: dict[Modality, EncoderCapture] = field(default_factory=dict)
    labels: Tensor | None = None
    shift_labels: Tensor | None = None
    prompt_lengths: Tensor | None = None
    chunks: Any = None
    _fetched: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Rows of the batch; 0 where nothing says."""
        shown = self.arguments.get("input_ids")
        shown = self.arguments.get("inputs_embeds") if shown is None else shown
        return 0 if shown is None else int(shown.shape[0])

    def fetch(self) -> None:
        """Copy what is read here to the host, before the encoder is launched: no wait for work."""
        found = (self.arguments.get(name) for name in ("input_ids", "attention_mask"))
        given = [t for t in found if isinstance(t, Tensor) and t.ndim == 2]
        known = [pair for pair in _COPIES.get() if any(pair[0] is one for one in given)]
        given = [one for one in given if not any(one is pair[0] for pair in known)]
        if len({(t.shape, t.device) for t in given}) == 1:  # one copy for both
            copies = torch.stack([t.long() for t in given]).cpu().unbind()
        else:
            copies = tuple(t.cpu() for t in given)
        self._fetched = [*known, *zip(given, copies, strict=True)]
        if isinstance(sizes := self.arguments.get(SIZES), Tensor):
            self._fetched.append((sizes, sizes.cpu()))
        self._check_lengths()

    def _check_lengths(self) -> None:
        """Refuse prompts that end behind their sample, where rows are samples."""
        if self.prompt_lengths is None or len(self.prompt_lengths) != self.rows:
            return
        mask = self.arguments.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            check_ends(self.prompt_lengths, self.on_host(mask).bool().sum(1).tolist())
            return
        cache = cache_of(self.arguments)
        past = 0 if cache is None else int(cache.get_seq_length())
        given = (self.arguments.get(name) for name in ("input_ids", "inputs_embeds"))
        shown = next(tensor for tensor in given if tensor is not None)
        check_ends(self.prompt_lengths, [past + shown.shape[1]] * self.rows)

    def on_host(self, tensor: Tensor) -> Tensor:
        """Its copy on the host (int64 where it was fetched ahead; else work is waited for)."""
        known = next((copy for given, copy in self._fetched if given is tensor), None)
        return tensor.cpu() if known is None else known


_COPIES: ContextVar[Sequence[tuple[Tensor, Tensor]]] = ContextVar("vispress_copies", default=())


@contextmanager
def knowing(copies: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Inside, these tensors are not fetched: their copies on the host are made already.

    Args:
        copies: A tensor that base models are called with, and its int64 copy on the host.
    """
    before = _COPIES.get()
    try:
        _COPIES.set(copies)
        yield
    finally:
        _COPIES.set(before)


SIZES = "image_sizes"
"""What AnyRes models are told of each image; read number by number."""
_Latest = tuple["weakref.ref[Plan]", Modality, "weakref.ref[EncoderCapture]"]
LATEST: ContextVar[tuple[_Latest, ...]] = ContextVar("vispress_latest", default=())
"""The last encoder call of each plan that lives; weak, so that it keeps no features alive."""
MODEL_CALLS: ContextVar[tuple[ModelCall, ...]] = ContextVar("vispress_calls", default=())


def brings_images(kwargs: Mapping[str, Any]) -> bool:
    """Whether a base model is called with something to look at."""
    if kwargs.get("pixel_values") is not None or kwargs.get("pixel_values_videos") is not None:
        return True
    encoded = kwargs.get("mm_encoder_outputs") or {}  # `generate` hands on an empty one, too
    return any(given is not None for given in encoded.values())


def remember(plan: Plan, capture: EncoderCapture) -> None:
    """Let a capture be the latest of its plan and modality."""
    others = [
        entry
        for entry in LATEST.get()
        if entry[2]() is not None and (entry[0]() is not plan or entry[1] != capture.modality)
    ]
    LATEST.set((*others, (weakref.ref(plan), capture.modality, weakref.ref(capture))))


def capture_of(plan: Plan, modality: Modality, output: Any) -> EncoderCapture:
    """What was seen when these features were computed (by `generate`, ahead of the forward)."""
    capture: EncoderCapture | None = getattr(output, CAPTURE_ATTRIBUTE, None)
    if capture is None:  # accelerate rebuilds containers on their way to a device
        found = (seen() for of, kind, seen in LATEST.get() if of() is plan and kind == modality)
        latest = next(found, None)
        if latest is not None and latest.gave(plan.adapter.features(modality, output)):
            capture = latest
    if capture is None:
        raise CompressionStateError(
            f"{modality} features were computed apart from this forward (cut into chunks by "
            "hand, or before compress_model): the signals that compression reads are missing. Pass "
            "pixel values, or let generate encode them; its prefill_chunk_size makes chunks, too"
        )
    if capture.asked != plan.asked_of_encoder:
        raise CompressionStateError(
            f"{modality} features were computed while the model was compressed otherwise, and its "
            "methods now read or merge something else in the encoder: compute them again"
        )
    return capture


@lru_cache(maxsize=64)
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def by_name(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by name, those of its `**kwargs` among them (defaults left out)."""
    if len(args) == 1 and isinstance(args[0], nn.Module):  # by keywords alone, as in every step
        return {"self": args[0], **kwargs}
    # a bound method would keep its model alive in the cache
    plain = isinstance(function, FunctionType)
    signature = _signature(function) if plain else inspect.signature(function)
    bound: dict[str, Any] = signature.bind_partial(*args, **kwargs).arguments
    more: dict[str, Any] = bound.get("kwargs", {})
    return {name: value for name, value in bound.items() if name != "kwargs"} | more


def decoder_arguments(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Give the arguments of a language model's call by name, of any release of transformers."""
    given = by_name(type(module).forward, (module, *args), kwargs)
    del given["self"]
    return renamed(given)
