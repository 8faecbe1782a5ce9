"""The oracle for any generation mode: the untouched model with its own full cache, and masks.

Unlike `oracle_generate`, which re-runs the whole sequence, this lets `generate` run as it likes on
the untouched model: beams, sampling, several turns. The dropped tokens stay in the cache and are
masked, in the mask that the model itself made for each layer.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from tests.laws.decoding import Stepping, noting_attention
from tests.laws.oracle import adds_behind, bypassing, gating_of, is_linear, language_model
from torch import Tensor, nn

from vispress.runtime.kv_cache.hf_compat import CACHE, cache_of


@contextmanager
def masked_model(
    model: Any,
    alive: Sequence[Tensor],
    positions: str = "original",
    values: Mapping[int, tuple[Tensor, Tensor]] | None = None,
    steps: Stepping | None = None,
) -> Iterator[None]:
    """Inside, `model` attends to alive positions only.

    Args:
        model: Not compressed.
        alive: `[B, L]` a decoder layer, for the prompt; later positions are alive.
        positions: `"compact"` renumbers in each layer.
        values: As in `oracle_forward`, for the prompt.
        steps: What layers see less of while decoding.
    """
    stack = language_model(model)
    seen: dict[str, Any] = {}
    by_type = "layer_type" in signature(stack.rotary_emb.forward).parameters

    def note(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen["ids"], cache = kwargs.get("position_ids"), cache_of(kwargs)
        seen["past"] = 0 if cache is None else int(cache.get_seq_length())
        seen["total"] = seen["past"] + kwargs["inputs_embeds"].shape[1]

    def hook_of(index: int) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            (hidden,) = args
            cache, linear = cache_of(kwargs), is_linear(stack.layers[index])
            past = seen["past"]
            if cache is not None and not linear:
                past = int(cache.get_seq_length(index))
            total = past + hidden.shape[1]
            live = _grow(alive[index], hidden.shape[0], total)
            valid = _grow(seen["valid"], hidden.shape[0], total)
            if past == 0 and index in (values or {}):
                assert values is not None
                rows, new = values[index]
                repeats = hidden.shape[0] // rows.shape[0]
                where = _grow(rows, hidden.shape[0], total, fill=False)
                if repeats > 1:  # values are in row-major order of the unrepeated batch
                    counts = rows.sum(1).tolist()
                    new = torch.cat([part.repeat(repeats, 1) for part in new.split(counts)])
                hidden = hidden.masked_scatter(where[..., None], new.to(hidden.dtype))
            if linear:
                return (hidden,), kwargs
            at = torch.arange(past, total)
            allow, first = _models_own(kwargs["attention_mask"], past, total)
            own = torch.arange(first, total) == at[:, None]
            dead = ~live[:, None, past:, None]
            allow = (allow & live[:, None, None, first:]) | (own & dead)
            if steps is not None:
                if index == 0:
                    steps.start(hidden.shape[0], past)
                allow = steps.narrow(index, allow)
            if stack.config._attn_implementation == "eager":
                least = torch.finfo(hidden.dtype).min
                allow = torch.zeros_like(allow, dtype=hidden.dtype).masked_fill(~allow, least)
            kwargs = kwargs | {"attention_mask": allow}
            if positions == "compact":
                dropped = (valid & ~live).long().cumsum(1)[:, past:]
                ids = seen["ids"]
                ids = at.expand(hidden.shape[0], -1) if ids is None else ids
                kind = [stack.config.layer_types[index]] if by_type else []
                kwargs["position_embeddings"] = stack.rotary_emb(
                    hidden, (ids - dropped).clamp(min=0), *kind
                )
            return (hidden,), kwargs

        return hook

    def bypass_of(index: int) -> Any:
        # one more mask where tokens bypass the last layer, and that of `with_valid` behind it
        count = len(stack.layers) + (len(alive) > len(stack.layers) + 1)
        rows = bypassing(alive[:count], index)

        def hook(_: nn.Module, args: Any, output: Any) -> Any:
            (before,), first = args, output[0] if isinstance(output, tuple) else output
            total = seen["total"]
            where = _grow(rows, before.shape[0], total, fill=False)[:, -before.shape[1] :]
            first = torch.where(where[..., None], before, first)
            return (first, *output[1:]) if isinstance(output, tuple) else first

        return hook

    # layer 0 before any placement in the LLM still has all real tokens; pads are alive nowhere
    seen["valid"] = torch.stack(list(alive)).any(0)
    handles = [stack.register_forward_pre_hook(note, with_kwargs=True)]
    for i, layer in enumerate(stack.layers):
        handles.append(layer.register_forward_pre_hook(hook_of(i), with_kwargs=True))
        handles.append(layer.register_forward_hook(bypass_of(i)))
        if is_linear(layer):
            layer.linear_attn.forward = _of_living(layer.linear_attn, alive[i])
        if i in (gates := getattr(values, "gates", {})):
            handles.append(adds_behind(layer, gates[i]).register_forward_hook(gating_of(gates[i])))
    try:
        with noting_attention(model, steps):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in filter(is_linear, stack.layers):
            layer.linear_attn.__dict__.pop("forward", None)


def _models_own(mask: Tensor | None, past: int, total: int) -> tuple[Tensor, int]:
    """`[B or 1, H or 1, Q, K]` bool, what the model lets a layer see, and its first column."""
    if mask is None:  # then SDPA is causal
        at = torch.arange(past, total)
        return (torch.arange(total) <= at[:, None])[None, None], 0
    mask = mask if mask.dtype == torch.bool else mask == 0
    return mask, total - mask.shape[-1]


def _of_living(module: Any, alive: Tensor) -> Any:
    """The forward of a linear layer whose state sees living rows of the prompt alone.

    They stand at the right, behind zeros, which leave a state as it begins.
    """

    def forward(hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        hidden, length = hidden_states, hidden_states.shape[1]
        run, cache = type(module).forward, kwargs.get(CACHE)
        later = cache is not None and cache.has_previous_state(module.layer_idx)
        if later or length < alive.shape[1]:
            return run(module, hidden, attention_mask=attention_mask, **kwargs)
        live = _grow(alive, len(hidden), length)
        order = live.long().argsort(dim=1, stable=True)
        index = order[..., None].expand_as(hidden)
        right = run(module, hidden.gather(1, index), attention_mask=live.gather(1, order), **kwargs)
        return torch.zeros_like(right).scatter(1, index, right)

    return forward


def with_valid(alive: Sequence[Tensor], valid: Tensor) -> list[Tensor]:
    """`alive` with a further entry that says which positions are real (for compact positions)."""
    return [*alive, valid]


def _grow(mask: Tensor, batch: int, length: int, *, fill: bool = True) -> Tensor:
    """A prompt's mask for repeated samples (beams) and generated tokens."""
    mask = mask.repeat_interleave(batch // mask.shape[0], dim=0)
    more = length - mask.shape[1]
    return (
        torch.cat([mask, mask.new_full((batch, more), fill)], dim=1)
        if more > 0
        else mask[:, :length]
    )
