"""Run the spine of one language-model call: begin, enter each layer, leave it, finish."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from vispress.errors import ConfigError
from vispress.precision import full_precision
from vispress.runtime.encoder.capture import projector_function
from vispress.runtime.forward import setup
from vispress.runtime.forward.apply_placement import apply, write_values
from vispress.runtime.forward.documents import (
    find_documents,
    find_ends,
    warn_of_taught_images,
)
from vispress.runtime.forward.expand import expand_output
from vispress.runtime.forward.measuring import measure_update
from vispress.runtime.forward.model_call import ModelCall, decoder_arguments
from vispress.runtime.forward.prefill_record import PrefillRecord
from vispress.runtime.forward.running import RUNNING, Running, carry_deepstack
from vispress.runtime.forward.softening import check_mode
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.forward.survey import is_true_throughout
from vispress.runtime.kv_cache.cache_layers import (
    check_cache,
    holds_padding,
    is_compressed,
    kv_bytes,
    note_states,
    refuse_shown_padding,
)
from vispress.runtime.kv_cache.hf_compat import CACHE, cache_of
from vispress.runtime.modules import held, untrained
from vispress.runtime.plan.plan import Plan
from vispress.runtime.stages.base import Entering, RuntimeStage, StageCall
from vispress.runtime.tokens import masks
from vispress.runtime.tokens.live_tokens import all_live, gather_rows
from vispress.types import Stage


def begin(
    plan: Plan,
    stages: Sequence[RuntimeStage],
    call: ModelCall,
    module: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> tuple[Running | None, dict[str, Any]]:
    """Decide what this call is: nothing of ours, a decode step on a short cache, or a prefill.

    Args:
        plan: What is asked of the model.
        stages: The stages of its chain.
        call: What the base model was called with, and what its vision encoder gave in (or before)
            this call.
        module: The language model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        The call under way (None when it is untouched), and keyword arguments that hold all
        arguments.
    """
    given, captures = decoder_arguments(module, args, kwargs), call.captures
    cache = cache_of(given)
    if not captures and not is_compressed(cache):
        return None, given
    masks.check_implementation(plan.implementation)
    embeds: Tensor = (
        given["inputs_embeds"]
        if given.get("inputs_embeds") is not None
        else (module.get_input_embeddings()(given["input_ids"]))
    )
    trains = module.training and torch.is_grad_enabled()
    if captures and plan.trained and not module.training:
        check_mode(plan.methods, held(plan.adapter.base))
    if trains and captures and cache is None and plan.softens_keys:
        given["use_cache"] = False  # later tokens would see whole what is soft here
    if cache is None and captures and _caches(module, given, trains):
        cache = given[CACHE] = DynamicCache(config=module.config)
    if cache is not None:
        check_cache(cache, plan.windows, plan.linear)
    state = make_state(plan, call, given, cache, embeds, trains)
    if cache is not None and state.past:
        plan.remembering.check(cache)
    length = state.past + embeds.shape[1]
    masks.check_windows(plan.implementation, plan.windows, length)
    if captures:
        documents = find_documents(state, given)
        ends = find_ends(call, documents, state)
        with full_precision():
            setup.find(plan, state, call, embeds, documents, ends)
        warn_of_taught_images(ends, state.layout)
    running = given[RUNNING] = Running(state, open_stages(stages, state))
    if captures:
        if plan.trained:
            running.remarks.append(partial(untrained, plan.adapter, plan.methods))
        given["inputs_embeds"] = _before_llm(running, module, given, embeds)
        given["input_ids"] = None
        if cache is not None:
            plan.remembering.begin(cache)
        if not plan.reads_encoder_late:
            for capture in captures.values():
                capture.release()
    carry_deepstack(given, state)
    return running, given


def open_stages(
    stages: Sequence[RuntimeStage], state: ForwardState
) -> list[tuple[frozenset[Stage], StageCall]]:
    """Open the stages that have something to do in a call; each may refuse its cache."""
    calls = []
    for stage in stages:
        opened = stage.open(state)
        if opened is None:
            continue
        if stage.refuse is not None:
            stage.refuse(state.plan.implementation, state.cache)
        calls.append((stage.carries, opened))
    return calls


def _caches(module: Any, given: Mapping[str, Any], trains: bool) -> bool:
    use_cache = given.get("use_cache")
    use_cache = module.config.use_cache if use_cache is None else use_cache
    # checkpointed layers run without a cache; without gradients none is checkpointed
    checkpointing = trains and getattr(module.layers[0], "gradient_checkpointing", False)
    return bool(use_cache) and not checkpointing


def make_state(
    plan: Plan,
    call: ModelCall,
    given: Mapping[str, Any],
    cache: Cache | None,
    embeds: Tensor,
    trains: bool,
) -> ForwardState:
    """Make the state of a call in which every row is there."""
    B, Q = embeds.shape[:2]
    past = 0 if cache is None else int(cache.get_seq_length())
    mask = given.get("attention_mask")
    mask_2d = next(
        (
            m
            for m in (mask, call.arguments.get("attention_mask"))
            if isinstance(m, Tensor) and m.ndim == 2
        ),
        None,
    )
    if mask_2d is not None and past and mask_2d.shape[1] < past + Q:
        raise ConfigError(
            f"attention_mask has {mask_2d.shape[1]} columns, but the KV cache holds {past} tokens "
            f"and the call brings {Q}; give one column for each of both"
        )
    mask_4d = isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.ndim == 4)
    # decode steps read one flag, prefills read rows: what was fetched ahead is not waited for
    read = mask_2d if mask_2d is None or not call.captures else call.on_host(mask_2d)
    if mask_2d is None and mask_4d:
        read = mask_2d = masks.shown(mask, past, B)
    shown = None if read is None else read[:, past : past + Q]
    step = Q == 1 and call.chunks is None  # its token is no padding
    valid = None if shown is None or step or is_true_throughout(shown) else shown.bool()
    if read is not None and valid is None and (past == 0 or is_true_throughout(read)):
        mask_2d = None
    if past and mask_2d is None:
        refuse_shown_padding(holds_padding(cache))
    counts = (Q,) * B if valid is None else tuple(valid.sum(1).tolist())
    # a copy: records outlive the call, and a mask that is kept for all steps is written on
    mask_2d = None if mask_2d is None else mask_2d.to(torch.bool, copy=True)
    chunk = None
    if valid is not None:
        assert mask_2d is not None
        chunk = mask_2d[:, past : past + Q]
    whole = all_live(B, Q, counts, embeds.device)
    position_ids = given.get("position_ids")
    if position_ids is None:
        position_ids = whole.index[:1] + past if past else whole.index[:1]
    return ForwardState(
        plan=plan,
        rows=[(0, whole)],
        past=past,
        cache=cache,
        mask_2d=mask_2d,
        chunk_valid=chunk,
        host_valid=None if valid is None else valid.cpu(),
        mask_4d=mask_4d,
        plain_masks=not mask_4d and (mask is not None or cache is not None),
        position_ids=position_ids if position_ids.ndim == 2 else None,
        trains=trains,
    )


def _before_llm(running: Running, module: Any, given: dict[str, Any], embeds: Tensor) -> Tensor:
    """Take the placements before the LLM; new values go into the full-length embeddings."""
    state = running.state
    project = projector_function(state.plan.adapter)
    whole, hidden = state.last, embeds
    for bound in state.plan.placements_at.get(0, ()):
        running.before_placement(bound, Entering(0, module, embeds, given))
        decision = running.place(bound, hidden)
        state.forget_reads(0)
        if decision is not None:
            embeds = write_values(decision, whole, hidden, embeds, project)
            state.take(0, decision)
            hidden = gather_rows(embeds, decision.rows.index, state.plan.backend)
    return embeds


def enter_layer(
    running: Running, number: int, module: Any, hidden: Tensor, kwargs: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """Give what decoder layer `number` is called with: hidden states and keyword arguments."""
    state = running.state
    hidden = _take_placements(running, Entering(number, module, hidden, kwargs))
    if number + 1 in state.plan.update_layers and number + 1 not in state.decided:
        state.entered = state.rows_before(number), hidden.detach()
    for enter in running.enters:
        hidden = enter(number, hidden)
    if state.short(number):
        kwargs = running.inputs.layer_kwargs(number, hidden, kwargs)
    for change in running.kwargs:
        kwargs = change(number, hidden, kwargs)
    state.rotary = kwargs.get("position_embeddings")
    if number in state.plan.linear:
        note_states(state.cache, halfway=True)
    elif not hidden.shape[1] and (held := state.cache_layer(number)) is not None:
        held.store_nothing()  # a chunk of which nothing is left passes its layers by
    return hidden, kwargs


def leave_layer(running: Running, number: int, out: Tensor) -> Tensor:
    """Give what decoder layer `number` hands on, from what it computed."""
    for leave in running.leaves:
        out = leave(number, out)
    return out


def _take_placements(running: Running, entering: Entering) -> Tensor:
    """Give the hidden states that enter a decoder layer behind its placements: rows go here."""
    state, number, hidden = running.state, entering.number, entering.hidden
    if number == 0 and (state.images or not state.untouched):
        rows = state.rows_before(0).to(hidden.device)
        return hidden if rows.whole else gather_rows(hidden, rows.index, state.plan.backend)
    if not state.images:
        return hidden
    placements = state.plan.placements_at.get(number)
    if placements is None:
        return hidden
    project = projector_function(state.plan.adapter)
    if number in state.decided:  # a checkpointed layer runs again: no second decision
        for decision in state.decided[number]:
            hidden = apply(decision, hidden, project)
        return hidden
    state.decided[number] = []
    if state.entered is not None:
        measure_update(state, hidden)
    for bound in placements:
        entering.hidden = hidden
        running.before_placement(bound, entering)
        # a checkpoint that wraps this hook must not count the tensors that deciding saves,
        # because its second run does not decide
        with torch.autograd.graph.saved_tensors_hooks(_itself, _itself):
            fresh = running.place(bound, hidden)
        if fresh is not None:
            hidden = apply(fresh, hidden, project)
            state.take(number, fresh)
            state.decided[number].append(fresh)
    state.forget_reads(number)
    return hidden


def _itself(saved: Tensor) -> Tensor:
    return saved


def finish(running: Running, output: Any) -> tuple[Any, ForwardState, PrefillRecord | None]:
    """Expand the output to the logical length; leave a record of a prefill for reports.

    Returns:
        What the language model gives (None: as it is), the call's state, and the record, if
        images came.
    """
    state = running.state
    note_states(state.cache, halfway=False)
    for call in running.calls:
        if call.end is not None:
            call.end()
    record = None
    if state.images:
        record = PrefillRecord.of(state, kv_bytes(state.cache), running.remarks)
    return expand_output(state, output), state, record
