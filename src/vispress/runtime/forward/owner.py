"""Read from the head above a base model what the base model is not told: where prompts end.

Labels are an argument of `...ForConditionalGeneration.forward` and go no deeper; `generate` knows
where its prompt ends, and its forwards, which may bring drafts too, do not. The owner of the base
model is patched, not hooked: PEFT calls its `forward` directly, which passes hooks by.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vispress.errors import CompressionStateError, ConfigError, UnsupportedModelError
from vispress.prompts import PROMPT_LENGTHS, as_lengths, current_lengths
from vispress.runtime.forward.model_call import brings_images, by_name
from vispress.runtime.hooks.compiling import between, outside, refuse_export
from vispress.runtime.hooks.instance_patch import Original, patch_instance
from vispress.runtime.kv_cache.hf_compat import cache_of


@dataclass(frozen=True, eq=False)
class OwnerCall:
    """What the owner's forward was called with beside the base model's arguments.

    Args:
        base: The base model it owns.
        labels: `[B, Q]`, or None.
        shift_labels: `[B, Q]`, one place ahead, or None.
        prompt_lengths: `[B]` int64 on the host, given as a keyword, or None.
    """

    base: nn.Module
    labels: Tensor | None = None
    shift_labels: Tensor | None = None
    prompt_lengths: Tensor | None = None


@dataclass(eq=False)
class Generating:
    """A `generate` under way.

    Args:
        base: The base model of what generates.
        prompt_lengths: `[B]` int64 on the host, of its prompts; None where it cannot be told.
        arguments: By name; of embeddings that come with ids and sizes of images, its forward is
            told no more than the embeddings.
        begun: Whether one of its forwards ran.
        in_chunks: Whether it prefills a prompt in several forwards.
        chunks: What was chosen for them, where the prompt has pictures (`forward.chunks.Chunks`).
    """

    base: nn.Module
    prompt_lengths: Tensor | None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    begun: bool = False
    in_chunks: bool = False
    chunks: Any = None


# Contexts, because what stands between these calls and the base model (heads, wrappers, loops of
# `generate`) hands nothing on. Both are set back by `finally`, which every interrupt runs.
OWNER_CALL: ContextVar[OwnerCall | None] = ContextVar("vispress_owner_call", default=None)
GENERATING: ContextVar[Generating | None] = ContextVar("vispress_generating", default=None)
LABELS: ContextVar[Tensor | None] = ContextVar("vispress_labels", default=None)


@contextmanager
def telling_labels(labels: Tensor | None) -> Iterator[None]:
    """Inside, models that are called without labels know these: a loss outside has them."""
    before = LABELS.get()
    try:
        LABELS.set(labels)
        yield
    finally:
        LABELS.set(before)


def find_owner(model: nn.Module, base: nn.Module) -> nn.Module | None:
    """Find the head that owns the base model: the innermost module around it that takes labels.

    Args:
        model: What the user has, wrapped or not.
        base: The base model in it.

    Returns:
        None when `model` is the base model, or nothing around it takes labels or generates.
    """
    path = next(name for name, module in model.named_modules() if module is base)
    names = path.split(".") if path else []
    around = [model.get_submodule(".".join(names[:n])) for n in reversed(range(len(names)))]
    for module in around:
        if "labels" in inspect.signature(type(module).forward).parameters:
            return module
    return next((module for module in around if hasattr(module, "generate")), None)


def patch_forward(owner: nn.Module, base: nn.Module) -> Callable[[], None]:
    """Let `owner_runs` answer the owner's `forward`; returns the undo."""
    return patch_instance(owner, "forward", partial(owner_runs, base), keyword=PROMPT_LENGTHS)


def patch_generation(owner: nn.Module, base: nn.Module) -> list[Callable[[], None]]:
    """Let `generates` answer `generate`, and refuse continuous batching; returns how to undo it."""
    undo = []
    if hasattr(owner, "generate"):
        wrapper = partial(generates, base)
        undo.append(patch_instance(owner, "generate", wrapper, keyword=PROMPT_LENGTHS))
    names = ("generate_batch", "init_continuous_batching")
    undo += [patch_instance(owner, n, refuses_batching) for n in names if hasattr(owner, n)]
    return undo


def check_replica(module: nn.Module, attached: nn.Module | None) -> None:
    """Refuse a copy that shares the hooks of the module they were made for.

    Raises:
        CompressionStateError: Says what works.
    """
    if module is not attached:
        raise CompressionStateError(
            "this is a replica of the compressed model (nn.DataParallel): the original's encoder "
            "and hooks would answer for it. Use DistributedDataParallel, one process a device, or "
            "device_map"
        )


def is_traced(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a compiled call is a step without images: nothing to remember, no break allowed."""
    return len(args) < 2 and not brings_images(kwargs)


def owner_runs(base: nn.Module, original: Original, *args: Any, **kwargs: Any) -> Any:
    """Answer the owner's `forward`: note what the base model will not be told."""
    lengths = kwargs.pop(PROMPT_LENGTHS, None)
    call = (base, original, lengths, args, kwargs)
    if not torch.compiler.is_compiling():
        return _run(original, partial(_note, *call), args, kwargs)
    refuse_export()
    if is_traced(args, kwargs):
        return original(*args, **kwargs)
    return _RUN_BETWEEN(original, partial(_NOTE_OUTSIDE, *call), args, kwargs)


def _run(
    original: Original,
    note: Callable[[], OwnerCall],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    call, before = note(), OWNER_CALL.get()
    try:
        OWNER_CALL.set(call)
        return original(*args, **kwargs)
    finally:
        OWNER_CALL.set(before)


def _note(
    base: nn.Module, original: Original, lengths: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> OwnerCall:
    labels = kwargs.get("labels")
    if labels is None and args:
        module = original.module
        labels = by_name(type(module).forward, (module, *args), kwargs).get("labels")
    labels = LABELS.get() if labels is None else labels
    given = None if lengths is None else as_lengths(lengths)
    return OwnerCall(base, labels, kwargs.get("shift_labels"), given)


_RUN_BETWEEN, _NOTE_OUTSIDE = between(_run), outside(_note)


def generates(base: nn.Module, original: Original, *args: Any, **kwargs: Any) -> Any:
    """Answer the owner's `generate`: note how long its prompts are, before any draft."""
    keyword = kwargs.pop(PROMPT_LENGTHS, None)
    lengths = current_lengths() if keyword is None else as_lengths(keyword)
    given = by_name(original.function, args, kwargs)
    found = _prompts_of(original, given)
    if lengths is None:
        lengths = found
    elif found is not None and len(found) != len(lengths):
        raise ConfigError(
            f"{PROMPT_LENGTHS} has {len(lengths)} entries, but generate got {len(found)} prompts"
        )
    before = GENERATING.get()
    try:
        GENERATING.set(Generating(base, lengths, given))
        return original(*args, **kwargs)
    finally:
        GENERATING.set(before)


def refuses_batching(original: Original, *args: Any, **kwargs: Any) -> Any:
    """Refuse continuous batching, whose paged cache cannot hold fewer rows in one layer.

    Raises:
        UnsupportedModelError: Says what would work.
    """
    raise UnsupportedModelError(
        f"{type(original.module).__name__}.{original.function.__name__}: continuous batching keeps "
        "a paged cache of equal length for all layers, and takes token ids without pictures; call "
        "generate(...), or remove_compression(model) first"
    )


def ids_of(given: Mapping[str, Any]) -> Any:
    """Give the token ids that `generate` is called with, under either name; None for none."""
    return next((x for x in map(given.get, ("input_ids", "inputs")) if x is not None), None)


def _prompts_of(original: Original, given: Mapping[str, Any]) -> Any:
    """`[B]` lengths of the prompts that `generate` is called with, as it will read them."""
    ids = ids_of(given)
    embeds, mask = given.get("inputs_embeds"), given.get("attention_mask")
    shown = ids if embeds is None else embeds
    if isinstance(mask, Tensor) and mask.ndim == 2:
        marks = mask.bool()
    elif isinstance(shown, Tensor) and shown.ndim >= 2:
        marks = torch.ones(shown.shape[:2], dtype=torch.bool, device=shown.device)
        if embeds is None and shown.ndim == 2:
            marks = _no_padding(original.module, given, shown, marks)
    else:
        return None
    cache = cache_of(given)
    if cache is not None and marks.shape[1] <= int(cache.get_seq_length()):
        return None  # it shows what is new alone, and not what of the rest is padding
    return marks.sum(1).cpu()


def _no_padding(owner: Any, given: Mapping[str, Any], ids: Tensor, marks: Tensor) -> Tensor:
    """Infer from the padding token what is padding, as `generate` does without a mask."""
    config = given.get("generation_config") or owner.generation_config

    def token(name: str) -> Any:
        found = given.get(name)
        found = getattr(config, name, None) if found is None else found
        return getattr(owner.generation_config, name, None) if found is None else found

    pad, ends = token("pad_token_id"), token("eos_token_id")
    ends = ends if isinstance(ends, list | tuple | Tensor) else [ends]
    if pad is None or any(end is not None and int(end) == int(pad) for end in ends):
        return marks
    return ids.ne(pad)


def begins_turn(base: nn.Module, length: int, *, fresh: bool) -> bool:
    """Tell whether a call is the first of a turn.

    Args:
        base: The base model.
        length: Tokens of the call.
        fresh: Whether nothing was cached before.
    """
    generating = GENERATING.get()
    if generating is None or generating.base is not base:
        return length > 1 or fresh
    begins, generating.begun = not generating.begun, True
    return begins


def amid_turn(base: nn.Module) -> bool:
    """Tell whether a single token behind others would go on with a turn, not begin one."""
    generating = GENERATING.get()
    return generating is None or generating.base is not base or generating.begun


def amid_chunks(base: nn.Module) -> bool:
    """Tell whether a call is part of a prompt that `generate` prefills in several."""
    generating = GENERATING.get()
    return generating is not None and generating.base is base and generating.in_chunks


def prompt_ends(
    base: nn.Module, given: Tensor | None, rows: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Give labels, shifted labels and prompt lengths of a base model's call.

    Args:
        base: The base model.
        given: Lengths from a keyword of its own.
        rows: Of the call: prompts that `generate` repeats (beams, several answers) stand side by
            side.
    """
    owner, generating = OWNER_CALL.get(), GENERATING.get()
    owner = owner if owner is not None and owner.base is base else OwnerCall(base)
    if generating is not None and generating.base is not base:
        generating = None
    lengths = owner.prompt_lengths if given is None else given
    if lengths is None:
        lengths = current_lengths() if generating is None else generating.prompt_lengths
    if lengths is not None and generating is not None and rows % len(lengths) == 0:
        lengths = lengths.repeat_interleave(rows // len(lengths))
    return owner.labels, owner.shift_labels, lengths
