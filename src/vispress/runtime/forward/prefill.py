"""The course of one language-model call: begin, enter each layer, finish."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from vispress.runtime.encoder.capture import projector_function
from vispress.runtime.forward import setup as locate
from vispress.runtime.forward.attention_reads import EnoughRead, TransitionMeasure
from vispress.runtime.forward.model_call import ModelCall, by_name
from vispress.runtime.forward.prefill_record import PrefillRecord
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.hooks.attention import MASK_HOOK
from vispress.runtime.kv_cache.dynamic import check_cache, is_compressed, kv_bytes
from vispress.runtime.kv_cache.hf_compat import CACHE, cache_of, renamed
from vispress.runtime.stages.decode import Decoding, open_selection
from vispress.runtime.stages.probe import probe
from vispress.runtime.stages.select import apply, asks, decide, write_values
from vispress.runtime.stages.skip import enter
from vispress.runtime.tokens import masks
from vispress.runtime.tokens.live_tokens import LiveTokens, all_live, gather_rows
from vispress.runtime.tokens.pair_masks import PairMasks
from vispress_kernels import Backend
from vispress_kernels.transition_scores import transition_scores

if TYPE_CHECKING:
    from vispress.runtime.attachment import Attachment


def begin(
    attachment: "Attachment",
    call: ModelCall,
    module: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> tuple[ForwardState | None, dict[str, Any]]:
    """Decide what this call is: nothing of ours, a decode step on a short cache, or a prefill.

    Args:
        attachment: The compressed model.
        call: What the base model was called with, and what its vision encoder gave in (or before)
            this call.
        module: The language model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        The state (None when the call is untouched), and keyword arguments that hold all arguments.
    """
    given = by_name(type(module).forward, (module, *args), kwargs)
    del given["self"]
    given, captures = renamed(given), call.captures
    cache = cache_of(given)
    if not captures and not is_compressed(cache):
        return None, given
    masks.check_implementation(attachment.adapter.language_model.config._attn_implementation)
    embeds: Tensor = (
        given["inputs_embeds"]
        if given.get("inputs_embeds") is not None
        else (module.get_input_embeddings()(given["input_ids"]))
    )
    if cache is None and captures and _caches(module, given):
        cache = given[CACHE] = DynamicCache(config=module.config)
    if cache is not None:
        check_cache(cache)
    state = _make_state(attachment, call, given, cache, embeds)
    step = attachment.decode_step
    if not captures:
        implementation = attachment.adapter.language_model.config._attn_implementation
        state.decoding = Decoding.of(step, cache, implementation, state.chunk_valid)
    if captures:
        locate.find(attachment, state, call, embeds)
        given["inputs_embeds"] = _before_llm(attachment, state, module, given, embeds)
        given["input_ids"] = None
        if step is not None and cache is not None and any(map(step.covers, state.images)):
            state.held_from = step.reads
        if not attachment.reads_encoder_late:
            for capture in captures.values():
                capture.release()
    state.pairs = PairMasks.of(attachment.pair_step, state)
    if state.pairs is not None:
        first = state.pairs.step.first
        state.held_from = first if state.held_from is None else min(first, state.held_from)
    return state, given


def _caches(module: Any, given: Mapping[str, Any]) -> bool:
    use_cache = given.get("use_cache")
    use_cache = module.config.use_cache if use_cache is None else use_cache
    # checkpointed layers run without a cache
    checkpointing = module.training and getattr(module.layers[0], "gradient_checkpointing", False)
    return bool(use_cache) and not checkpointing


def _make_state(
    attachment: "Attachment",
    call: ModelCall,
    given: Mapping[str, Any],
    cache: Cache | None,
    embeds: Tensor,
) -> ForwardState:
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
    mask_4d = isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.ndim == 4)
    # decode steps read one flag, prefills read rows: what was fetched ahead is not waited for
    read = mask_2d if mask_2d is None or not call.captures else call.on_host(mask_2d)
    if mask_2d is None and mask_4d:
        read = mask_2d = _mask_2d(mask, past, B)
    valid = None if read is None else read[:, past : past + Q].bool()
    if valid is not None and (Q == 1 or bool(valid.all())):
        valid = None
        if past == 0 or bool(read.all()):  # type: ignore[union-attr]
            mask_2d = None
    counts = (Q,) * B if valid is None else tuple(valid.sum(1).tolist())
    mask_2d, chunk = None if mask_2d is None else mask_2d.bool(), None
    if valid is not None:
        assert mask_2d is not None
        chunk = mask_2d[:, past : past + Q]
    whole = all_live(B, Q, counts, embeds.device)
    position_ids = given.get("position_ids")
    if position_ids is None:
        position_ids = whole.index[:1] + past if past else whole.index[:1]
    return ForwardState(
        attachment=attachment,
        rows=[(0, whole)],
        past=past,
        cache=cache,
        mask_2d=mask_2d,
        chunk_valid=chunk,
        host_valid=None if valid is None else valid.cpu(),
        mask_4d=mask_4d,
        position_ids=position_ids if position_ids.ndim == 2 else None,
    )


def _mask_2d(mask: Any, past: int, batch: int) -> Tensor | None:
    """Which logical positions are real, read off a 4-D mask: a real token sees itself."""
    if isinstance(mask, dict):
        mask = next((m for m in mask.values() if isinstance(m, Tensor)), None)
    if not isinstance(mask, Tensor):
        return None
    seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    own = seen.diagonal(offset=past, dim1=-2, dim2=-1)
    return torch.cat([seen[:, -1, :past], own], dim=1).expand(batch, -1)


def _before_llm(
    attachment: "Attachment",
    state: ForwardState,
    module: Any,
    given: Mapping[str, Any],
    embeds: Tensor,
) -> Tensor:
    """Take the placements before the LLM; new values go into the full-length embeddings."""
    project = projector_function(attachment.adapter)
    whole, hidden = state.last, embeds
    for step in attachment.steps:
        if step.placement.layer > 0:
            break
        if step.placement.probe is not None and asks(state, step):
            probe(state, step.placement, module, given, embeds)
        decision = decide(state, step, hidden)
        for want in state.wanted:
            if want.mode == "probe":
                want.forget()
        if decision is not None:
            embeds = write_values(decision, whole, hidden, embeds, project)
            state.take(0, decision)
            hidden = gather_rows(embeds, decision.rows.index, attachment.backend)
    return embeds


def enter_layer(
    state: ForwardState, number: int, module: Any, hidden: Tensor, kwargs: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """What decoder layer `number` is called with: hidden states, and keyword arguments for them."""
    hidden = _drop_rows(state, number, module, hidden, kwargs)
    hidden = enter(module, state.span_at(number), hidden, state.attachment.backend)
    if state.short(number):
        kwargs = state.layer_kwargs(number, hidden, kwargs)
    step = state.attachment.decode_step
    if state.decoding is not None:
        kwargs = state.decoding.layer_kwargs(number, hidden, kwargs)
    elif step is not None and number == step.reads and state.images and state.cache is not None:
        open_selection(step, state)
    if state.pairs is not None and state.mode == "run" and number >= state.pairs.step.first:
        kwargs = kwargs | {MASK_HOOK: state.pairs.at(state, number, hidden.device)}
    state.rotary = kwargs.get("position_embeddings")
    return hidden, kwargs


def _drop_rows(
    state: ForwardState, number: int, module: Any, hidden: Tensor, kwargs: dict[str, Any]
) -> Tensor:
    """Hidden states that enter decoder layer `number`: rows are dropped here."""
    if not state.images:
        return hidden
    if number == 0:
        rows = state.rows_before(0).to(hidden.device)
        return hidden if rows.whole else gather_rows(hidden, rows.index, state.attachment.backend)
    attachment = state.attachment
    if number not in attachment.steps_at:
        return hidden
    project = projector_function(attachment.adapter)
    if number in state.decided:  # a checkpointed layer runs again: no second decision
        for decision in state.decided[number]:
            hidden = apply(decision, hidden, project)
        return hidden
    state.decided[number] = []
    for step in attachment.steps_at[number]:
        if step.placement.queries is not None and step.placement.attention_of == "next":
            for want in state.wanted:  # a step before at this layer may have dropped rows
                want.seen = want.seen and not (want.mode == "peek" and want.layer == number)
            _peek(state, number, module, hidden, kwargs)
        # a checkpoint that wraps this hook must not count the tensors that deciding saves,
        # because its second run does not decide
        with torch.autograd.graph.saved_tensors_hooks(_itself, _itself):
            fresh = decide(state, step, hidden)
        if fresh is not None:
            hidden = apply(fresh, hidden, project)
            state.take(number, fresh)
            state.decided[number].append(fresh)
    for want in state.wanted:
        if want.seen and want.until <= number:
            want.forget()
    return hidden


def _itself(saved: Tensor) -> Tensor:
    return saved


@torch.no_grad()
def _peek(
    state: ForwardState, number: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]
) -> None:
    """Read attention rows of a layer that has not run, on the rows that are still there."""
    arguments = state.peek_kwargs(number, hidden, kwargs)
    state.mode, state.rotary = "peek", arguments["position_embeddings"]
    # dropout inside projections (LoRA) must not move the generators of the real run
    devices = [hidden.device] if hidden.is_cuda and layer.training else []
    try:
        with torch.random.fork_rng(devices=devices, enabled=layer.training):
            layer.self_attn(hidden_states=layer.input_layernorm(hidden), **arguments)
    except EnoughRead:
        pass
    finally:
        state.mode = "run"


def measure(state: ForwardState, number: int, part: int, x: Tensor, y: Tensor) -> None:
    """Note how far a module (0 attention, 1 MLP) moved its rows."""
    found = transition_scores(x.detach(), y.detach(), backend=state.attachment.backend)
    if part == 0:
        state.transitions[number] = TransitionMeasure(state.rows_at(number), [found])
    else:
        state.transitions[number].found.append(found)


def finish(attachment: "Attachment", state: ForwardState, output: Any) -> Any:
    """Expand the hidden states to the logical length and leave a record for reports."""
    if state.images:
        attachment.record = PrefillRecord.of(attachment, state, kv_bytes(state.cache))
    if state.untouched:
        return None
    backend = attachment.backend
    if isinstance(output, tuple):
        return (_expand(output[0], state.last, backend), *output[1:])
    output.last_hidden_state = _expand(output.last_hidden_state, state.last, backend)
    if output.get("hidden_states") is not None:  # input of layer 0, then the output of each layer
        output.hidden_states = tuple(
            _expand(hidden, state.rows_before(number - 1), backend) if number else hidden
            for number, hidden in enumerate(output.hidden_states)
        )
    return output


def _expand(hidden: Tensor, rows: LiveTokens, backend: Backend) -> Tensor:
    """`[B, P, D]` to `[B, Q, D]`: dropped places carry the nearest earlier survivor."""
    if rows.whole or hidden.shape[1] != rows.size:
        return hidden
    return gather_rows(hidden, rows.to(hidden.device).place, backend)
