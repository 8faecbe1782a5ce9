"""Prefill in chunks (`prefill_chunk_size`): choose on the whole prompt, then run it by chunks.

`generate` encodes the pictures ahead and cuts the prompt, placeholders of a picture among it, into
chunks of logical tokens, one forward each. Before the first, the forward of the whole prompt is
begun as it would be without chunks, and ends where the language model would start: there methods
that act before it have chosen. Each chunk then is a later turn on the cache, which runs what that
choice has left of it.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from vispress.errors import UnsupportedMethodError, UnsupportedModelError
from vispress.runtime.forward import prefill
from vispress.runtime.forward.model_call import ModelCall, by_name, decoder_arguments
from vispress.runtime.forward.owner import GENERATING
from vispress.runtime.forward.prefill_record import PrefillRecord
from vispress.runtime.forward.running import RUNNING, Running, carry_deepstack
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.hooks.instance_patch import Original
from vispress.runtime.kv_cache.cache_layers import check_cache, kv_bytes
from vispress.runtime.kv_cache.evicting import pack
from vispress.runtime.kv_cache.hf_compat import CHUNKS_HAVE_PICTURES, cache_of
from vispress.runtime.plan.plan import Plan
from vispress.runtime.stages.base import RuntimeStage
from vispress.runtime.tokens import masks
from vispress.runtime.tokens.live_tokens import narrow
from vispress.types import Stage

_AHEAD = (Stage.ENCODER, Stage.PRE_LLM)
_INSTEAD = "leave prefill_chunk_size out, or compress with a method that chooses before the LLM"


class Chosen(Exception):  # noqa: N818  (control flow, not an error)
    """Ends the forward of a whole prompt once it is known what is kept."""


@dataclass(eq=False)
class Chunks:
    """A prompt that runs in chunks; lives as long as `generate` prefills it.

    Args:
        running: The call of the whole prompt, behind its choice; None before it.
        embeds: `[B, Q, D]`, its embeddings, if the choice gave some tokens other values.
        last: `[B, 1, D]`, what the language model gave of the latest place.
    """

    running: Running | None = None
    embeds: Tensor | None = None
    last: Tensor | None = None

    @property
    def state(self) -> ForwardState:
        """Of the whole prompt."""
        assert self.running is not None
        return self.running.state

    @cached_property
    def dropped(self) -> tuple[Tensor, Tensor] | None:
        """`[B, Q]` bool, visual tokens that no layer runs on, also on the host; None for none."""
        state = self.state
        if state.untouched:
            return None
        gone, valid = ~state.last.alive, state.chunk_valid
        gone = gone if valid is None else gone & valid.to(gone.device)
        return gone, gone.cpu()


class Planned(Protocol):
    """Has the plan that stands."""

    plan: Plan


def run(attached: Planned, original: Original, *args: Any, **kwargs: Any) -> Any:
    """Answer `_prefill` of what generates: choose ahead of the chunks, if it is to run in some.

    Args:
        attached: Has what is asked of the model.
        original: The method, which calls the forward once or chunk by chunk.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Raises:
        UnsupportedMethodError: A method acts inside the language model, or reads it.
        UnsupportedModelError: The cache is a static one.
    """
    plan, given = attached.plan, by_name(original.function, args, kwargs)
    config: Any = given.get("generation_config")
    generating = GENERATING.get()
    of_this = generating is not None and generating.base is plan.adapter.base
    if getattr(config, "prefill_chunk_size", None) is None or not of_this:
        return original(*args, **kwargs)
    assert generating is not None
    told: dict[str, Any] = given["model_kwargs"]
    encoded = (told.get("mm_encoder_outputs") or {}).values()
    brings = given.get("is_first_iteration", True) and any(one is not None for one in encoded)
    try:
        generating.in_chunks = True
        if brings and CHUNKS_HAVE_PICTURES:
            _refuse(plan, cache_of(told))
            generating.chunks = Chunks()
            whole = copy(config)
            whole.prefill_chunk_size = None
            with suppress(Chosen):  # what transformers calls without chunks, up to the choice
                original(**given | {"generation_config": whole, "model_kwargs": dict(told)})
        return original(*args, **kwargs)
    finally:
        generating.in_chunks, generating.chunks = False, None


def _refuse(plan: Plan, cache: Any) -> None:
    """Refuse what a chunk does not show: the language model's attention to the whole prompt."""
    for bound in plan.placements:
        at = bound.placement
        if at.stage not in _AHEAD or at.probe is not None or at.queries is not None:
            raise UnsupportedMethodError(
                f"{bound.method.name} acts in the language model or reads it, which sees the "
                f"prompt in chunks under prefill_chunk_size: {_INSTEAD} and from what the encoder "
                "shows (divprune, visionzip)"
            )
    kinds = [type(layer) for layer in getattr(cache, "layers", ())]
    kinds.append(getattr(cache, "layer_class_to_replicate", None) or object)
    if any(issubclass(kind, StaticLayer) for kind in kinds):
        raise UnsupportedModelError(
            "a static cache is allocated short by the first forward, and under prefill_chunk_size "
            "that does not hold the prompt: use DynamicCache(), or leave prefill_chunk_size out"
        )


def begin(
    plan: Plan,
    stages: Sequence[RuntimeStage],
    call: ModelCall,
    module: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> tuple[Running, dict[str, Any]]:
    """Do what `prefill.begin` does, of a chunk, or of the whole of some.

    Raises:
        Chosen: It was that, and has chosen.
    """
    if call.chunks.running is None:
        running, given = prefill.begin(plan, stages, call, module, args, kwargs)
        assert running is not None
        call.chunks.running, embeds = running, given["inputs_embeds"]
        call.chunks.embeds = None if embeds is kwargs.get("inputs_embeds") else embeds
        raise Chosen
    return _begin_chunk(plan, stages, call, module, args, kwargs)


def _begin_chunk(
    plan: Plan,
    stages: Sequence[RuntimeStage],
    call: ModelCall,
    module: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> tuple[Running, dict[str, Any]]:
    given, chunks = decoder_arguments(module, args, kwargs), call.chunks
    cache, embeds = cache_of(given), given["inputs_embeds"]
    assert cache is not None
    check_cache(cache, plan.windows, plan.linear)
    state = prefill.make_state(plan, call, given, cache, embeds, trains=False)
    masks.check_windows(plan.implementation, plan.windows, state.past + embeds.shape[1])
    running = given[RUNNING] = Running(state, prefill.open_stages(stages, state))
    running.chunks = chunks
    start = state.past - chunks.state.past
    part = slice(start, start + embeds.shape[1])
    _narrow(state, chunks, part)
    if chunks.embeds is not None:
        given["inputs_embeds"] = chunks.embeds[:, part].to(embeds.device)
    carry_deepstack(given, state)
    return running, given


def _narrow(state: ForwardState, chunks: Chunks, part: slice) -> None:
    """Leave in a chunk what the choice left of it, and no padding."""
    if chunks.dropped is None:
        return
    (dropped, on_host), whole = chunks.dropped, state.last
    gone, drop = tuple(on_host[:, part].sum(1).tolist()), dropped[:, part].to(whole.index.device)
    rows, _ = narrow(whole, drop, gone, compact=False, valid=state.valid_rows(whole))
    if (closed := chunks.state.last.dropped) is not None:  # gaps that positions close
        rows.dropped = closed[:, part].to(drop.device)
    state.rows.append((0, rows))


def finish(running: Running, output: Any) -> tuple[Any, ForwardState, PrefillRecord | None]:
    """Do what `prefill.finish` does, of a chunk.

    Returns:
        What the language model gives, the state of what is finished (behind the last chunk, the
        whole prompt), and its record.
    """
    chunks: Chunks = running.chunks
    given, state, _ = prefill.finish(running, output)
    given = output if given is None else given
    _carry(state, chunks, given)
    whole = chunks.state
    if state.past + state.last.length < whole.past + whole.last.length:
        return given, state, None
    assert state.cache is not None
    pack(state.cache)
    whole.cache = state.cache
    assert chunks.running is not None
    remarks = chunks.running.remarks
    return given, whole, PrefillRecord.of(whole, kv_bytes(state.cache), remarks)


def _carry(state: ForwardState, chunks: Chunks, output: Any) -> None:
    """Let places without a survivor ahead of them in their chunk have what the last one gave."""
    out = output.last_hidden_state
    if chunks.last is not None and not state.untouched:
        none = state.last.alive.cumsum(1) == 0
        ahead, last = none.to(out.device).unsqueeze(-1), chunks.last.to(out.device)
        out = output.last_hidden_state = torch.where(ahead, last, out)
    chunks.last = out[:, -1:]
