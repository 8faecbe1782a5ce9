"""The masked oracle: what a compressed model must compute, without any of the library's runtime.

The untouched full-length model runs with every row in every layer; a 4-D mask, set by hooks that
live for one call, lets each decoder layer attend only to the positions that are alive in it. There
is no cache and no past: for a second turn, give the whole conversation and its `alive`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Positions = Literal["original", "compact"]
Values = Mapping[int, tuple[Tensor, Tensor]]
"""Layer -> (which rows `[B, L]` bool, their new values `[rows, D]` in row-major order)."""


def language_model(model: nn.Module) -> Any:
    """The decoder stack: the only part with both `layers` and a rotary embedding."""
    for module in model.modules():
        if hasattr(module, "layers") and hasattr(module, "rotary_emb"):
            return module
    raise ValueError(f"{type(model).__name__} has no decoder stack with rotary embeddings")


def all_alive(model: nn.Module, inputs: Mapping[str, Any]) -> list[Bool[Tensor, "B L"]]:
    """The `alive` of a model that drops nothing: one mask a decoder layer, padding excluded."""
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
    return [mask.bool().clone() for _ in language_model(model).layers]


def dropped_from(
    alive: Sequence[Bool[Tensor, "B L"]], layer: int, drop: Bool[Tensor, "B L"]
) -> list[Bool[Tensor, "B L"]]:
    """`alive` with the positions of `drop` gone from decoder layer `layer` on."""
    return [mask & ~drop if i >= layer else mask.clone() for i, mask in enumerate(alive)]


def oracle_forward(
    model: Any,
    inputs: Mapping[str, Any],
    alive: Sequence[Bool[Tensor, "B L"]],
    positions: Positions = "original",
    values: Values | None = None,
    documents: Int[Tensor, "B L"] | None = None,
) -> Float[Tensor, "B L V"]:
    """Logits of the untouched model in which each layer attends to its alive positions only.

    Differentiable; rows that are not alive are finite and mean nothing (`oracle_expand` says what
    stands there in a compressed model).

    Args:
        model: A `ForConditionalGeneration` model that is not compressed.
        inputs: Its keyword arguments, whole sequence.
        alive: For each decoder layer, which positions enter it (padding is excluded in any case);
            where some bypass the last one, a further mask of what stands behind it.
        positions: `"compact"`: in each layer, a position is what it was minus the dropped tokens
            before it. Not defined for M-RoPE models.
        values: Rows whose hidden states are replaced before a layer (merging, synthesised tokens).
        documents: Number of the document at each position, where rows hold several.
    """
    length = alive[0].shape[1]
    documents = torch.zeros(alive[0].shape, dtype=torch.int64) if documents is None else documents
    with _masked(model, inputs, alive, positions, {} if values is None else values, documents):
        logits = model(**{**inputs, "use_cache": False}).logits
    if logits.shape[1] != length:
        raise ValueError(f"alive has length {length}, the sequence {logits.shape[1]}")
    return logits  # type: ignore[no-any-return]


def gating_of(gate: "Float[Tensor, 'B L'] | Sliced") -> Any:
    """A forward hook that scales what an MLP adds; behind the prompt it adds all of it."""
    if isinstance(gate, Sliced):
        return gate

    def hook(_: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        own = gate.repeat_interleave(first.shape[0] // gate.shape[0], dim=0)
        if first.shape[1] < own.shape[1]:  # a later call
            return None
        more = own.new_ones(len(own), first.shape[1] - own.shape[1])
        first = first * torch.cat([own, more], 1)[..., None]
        return (first, *output[1:]) if isinstance(output, tuple) else first

    return hook


def adds_behind(layer: Any, gate: "Tensor | Sliced") -> nn.Module:
    """The module whose output a gate scales: the MLP, or a norm behind it (Gemma, GLM-4.1V)."""
    if isinstance(gate, Sliced):
        return layer.mlp  # type: ignore[no-any-return]
    norms = ("post_feedforward_layernorm", "post_mlp_layernorm")
    return next((getattr(layer, each) for each in norms if hasattr(layer, each)), layer.mlp)


@dataclass(frozen=True)
class Sliced:
    """A forward hook by which an MLP maps some rows by its first neurons, masked here.

    Args:
        rows: `[B, L]` bool, of the prompt.
        ratio: How many times fewer neurons.
    """

    rows: Tensor
    ratio: int

    def __call__(self, mlp: Any, args: Any, output: Tensor) -> Tensor | None:
        """Replace what these rows got."""
        (hidden,) = args
        rows = self.rows.repeat_interleave(hidden.shape[0] // self.rows.shape[0], dim=0)
        if hidden.shape[1] < rows.shape[1]:  # a later call
            return None
        rows = extend(rows, hidden.shape[1] - rows.shape[1], fill=False)
        inner = mlp.act_fn(mlp.gate_proj(hidden)) * mlp.up_proj(hidden)
        stays = torch.arange(inner.shape[-1]) < inner.shape[-1] // self.ratio
        return torch.where(rows[..., None], mlp.down_proj(inner * stays), output)


def bypassing(alive: Sequence[Tensor], layer: int) -> Bool[Tensor, "B L"]:
    """Rows that are not alive in a layer but in a later one: it leaves them as they are."""
    return ~alive[layer] & torch.stack(list(alive[layer:])).any(0)


def bypass_of(rows: Bool[Tensor, "B L"]) -> Any:
    """A forward hook that undoes a layer where rows bypass it."""

    def hook(_: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.where(rows[..., None], args[0], output[0]), *output[1:])
        return torch.where(rows[..., None], args[0], output)

    return hook


def oracle_attentions(
    model: Any,
    inputs: Mapping[str, Any],
    alive: Sequence[Bool[Tensor, "B L"]],
    positions: Positions = "original",
    values: Values | None = None,
) -> list[Float[Tensor, "B H L L"]]:
    """Attention maps of `oracle_forward` (eager attention), zeros in rows that are not alive."""
    documents = torch.zeros_like(alive[0], dtype=torch.long)
    with _masked(model, inputs, alive, positions, {} if values is None else values, documents):
        maps = model(**inputs, use_cache=False, output_attentions=True).attentions
    return [each * live[:, None, :, None] for each, live in zip(maps, alive, strict=True)]


@contextmanager
def taken_off(model: Any, handles: Sequence[Any]) -> Iterator[None]:
    """Take hooks off behind a block, and leave the model the M-RoPE offsets that it had."""
    deltas = getattr(model.model, "rope_deltas", None)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        if hasattr(model.model, "rope_deltas"):
            model.model.rope_deltas = deltas


@contextmanager
def _masked(
    model: Any,
    inputs: Mapping[str, Any],
    alive: Sequence[Tensor],
    positions: Positions,
    values: Values,
    documents: Tensor,
) -> Iterator[None]:
    stack = language_model(model)
    _check(model, stack, alive, positions)
    valid = inputs.get("attention_mask")
    valid = torch.ones_like(alive[0]) if valid is None else valid.bool()
    seen: dict[str, Any] = {}
    kinds = getattr(stack.config, "layer_types", None) or ()
    windowed = any(kind != "full_attention" for kind in kinds)
    by_type = "layer_type" in signature(stack.rotary_emb.forward).parameters

    def note_positions(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen["ids"] = kwargs.get("position_ids")

    def hook_of(index: int) -> Any:
        live = alive[index] & valid

        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            (hidden,) = args
            if index in values:
                rows, new = values[index]
                hidden = hidden.masked_scatter(rows[..., None], new.to(hidden.dtype))
            # windows, and tokens of an image that see each other, are as the model has them
            if is_linear(stack.layers[index]):
                return (hidden,), kwargs
            own = kwargs["attention_mask"] if windowed else None
            mask = _mask(live, documents, stack.config, hidden.dtype, own)
            soft = getattr(values, "soft", {}).items()
            for bias in (bias for layer, bias in soft if layer <= index):
                if mask.dtype == torch.bool:
                    least = torch.finfo(hidden.dtype).min
                    mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, least)
                mask = torch.where(mask > -1e9, mask + bias[:, None, None], mask)
            kwargs = kwargs | {"attention_mask": mask}
            if positions == "compact":
                ids = _compact(seen["ids"], live, valid, documents)
                kind = [kinds[index]] if by_type else []
                kwargs["position_embeddings"] = stack.rotary_emb(hidden, ids, *kind)
            return (hidden,), kwargs

        return hook

    handles = [stack.register_forward_pre_hook(note_positions, with_kwargs=True)]
    for i, layer in enumerate(stack.layers):
        handles.append(layer.register_forward_pre_hook(hook_of(i), with_kwargs=True))
        live = alive[i] & valid
        if is_linear(layer) and not torch.equal(live, valid):
            hook = shorter(live)
            handles.append(layer.linear_attn.register_forward_hook(hook, with_kwargs=True))
        handles.append(layer.register_forward_hook(bypass_of(bypassing(alive, i))))
        if i in (gates := getattr(values, "gates", {})):
            handles.append(adds_behind(layer, gates[i]).register_forward_hook(gating_of(gates[i])))
    with taken_off(model, handles):
        yield


def is_linear(layer: Any) -> bool:
    """Whether a decoder layer has a state in place of keys and values."""
    return hasattr(layer, "linear_attn")


def shorter(live: Bool[Tensor, "B L"]) -> Any:
    """A forward hook by which a linear layer runs on the shorter sequence of each sample.

    A masked row is no missing one there: its zeros go through the convolution, and time passes.
    """

    def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        hidden, found = kwargs["hidden_states"], []
        for sample, rows in zip(hidden, live, strict=True):
            own = torch.zeros_like(sample)
            if rows.any():
                short = type(module).forward(module, sample[rows][None])[0]
                own = own.masked_scatter(rows[:, None], short)
            found.append(own)
        return torch.stack(found)

    return hook


def _check(model: Any, stack: Any, alive: Sequence[Tensor], positions: Positions) -> None:
    if len(alive) not in (len(stack.layers), len(stack.layers) + 1):
        raise ValueError(f"alive has {len(alive)} masks for {len(stack.layers)} decoder layers")
    if any(module._forward_pre_hooks for module in (stack, *stack.layers)):
        raise ValueError("the decoder has hooks: the oracle wants an untouched model")
    if positions == "compact" and hasattr(model.model, "rope_deltas"):
        raise ValueError("compact positions are not defined for M-RoPE models")


def _mask(
    live: Tensor, documents: Tensor, config: Any, dtype: torch.dtype, models: Tensor | None
) -> Tensor:
    """`[B, 1, L, L]`: causal over live keys; other rows see themselves too, to stay finite.

    What the model itself hands a layer stands in place of "causal", where it is given.
    """
    length = live.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=live.device).tril()
    if models is not None:
        causal = (models if models.dtype == torch.bool else models == 0)[:, 0]
    causal = causal & (documents[:, :, None] == documents[:, None])
    own = torch.eye(length, dtype=torch.bool, device=live.device)
    allowed = ((causal & live[:, None]) | (own & ~live[:, :, None]))[:, None]
    if config._attn_implementation == "sdpa":
        return allowed
    if config._attn_implementation == "eager":
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
    raise ValueError(f"the oracle runs sdpa or eager, not {config._attn_implementation}")


def _compact(
    ids: Tensor | None, live: Tensor, valid: Tensor, documents: Tensor
) -> Int[Tensor, "B L"]:
    """Position ids of a layer: what they were, minus what its document lost before each."""
    if ids is None:
        ids = torch.arange(live.shape[1], device=live.device).expand_as(live)
    dropped, before = (valid & ~live).long(), torch.zeros_like(documents)
    for number in documents.unique().tolist():
        own = documents == number
        before += ((dropped * own).cumsum(-1) - dropped) * own
    return (ids - before).clamp(min=0)


def oracle_expand(
    logits: Float[Tensor, "B L V"],
    last: Bool[Tensor, "B L"],
    documents: Int[Tensor, "B L"] | None = None,
) -> Float[Tensor, "B L V"]:
    """What a compressed model shows at every position of the full sequence.

    Args:
        logits: As `oracle_forward` returns them.
        last: Positions alive in the last decoder layer. The others carry the logits of the nearest
            earlier one of these, or of the first one if none is earlier.
        documents: Number of the document at each position, where rows hold several: each has its
            own.
    """
    documents = torch.zeros(last.shape, dtype=torch.int64) if documents is None else documents
    places = torch.arange(last.shape[1], device=last.device).expand_as(last)
    index = torch.zeros_like(places)
    for number in documents.unique().tolist():
        own = documents == number
        nearest = places.masked_fill(~(last & own), -1).cummax(-1).values
        first = (last & own).long().argmax(-1, keepdim=True)
        index = torch.where(own, torch.where(nearest < 0, first, nearest), index)
    return logits.gather(1, index[..., None].expand_as(logits))


def oracle_loss(
    model: Any,
    inputs: Mapping[str, Any],
    labels: Int[Tensor, "B L"],
    alive: Sequence[Bool[Tensor, "B L"]],
    positions: Positions = "original",
    values: Values | None = None,
) -> Float[Tensor, ""]:
    """Teacher-forced loss of a compressed model, on expanded logits; backward gives gradients."""
    logits = oracle_forward(model, inputs, alive, positions, values)
    logits = oracle_expand(logits, alive[-1])
    vocab = model.config.get_text_config().vocab_size
    return model.loss_function(logits=logits, labels=labels, vocab_size=vocab)  # type: ignore[no-any-return]


@torch.no_grad()
def oracle_generate(
    model: Any,
    inputs: Mapping[str, Any],
    alive: Sequence[Bool[Tensor, "B L"]],
    new_tokens: int,
    positions: Positions = "original",
    values: Values | None = None,
) -> tuple[Int[Tensor, "B T"], Float[Tensor, "B T V"]]:
    """Greedy decoding by running the whole growing sequence through the oracle at each step.

    Position ids are those that `generate` uses (padding not counted; M-RoPE from the model's own
    rope index of the prompt, then counting on). Generated tokens are alive everywhere.

    Returns:
        The new tokens and the logits each was chosen from.
    """
    prompt = inputs["input_ids"].shape[1]
    tokens: list[Tensor] = []
    steps: list[Tensor] = []
    for _ in range(new_tokens):
        grown = _grow(inputs, tokens)
        grown["position_ids"] = generate_positions(model, grown, prompt)
        now = [extend(mask, len(tokens), fill=True) for mask in alive]
        rows = {
            k: (extend(mask, len(tokens), fill=False), v) for k, (mask, v) in (values or {}).items()
        }
        rows = with_gates(rows, values)
        logits = oracle_forward(model, grown, now, positions, rows)
        steps.append(logits[:, -1])
        tokens.append(logits[:, -1].argmax(-1))
    return torch.stack(tokens, 1), torch.stack(steps, 1)


class _Gated(dict[int, tuple[Tensor, Tensor]]):
    """Values, and gates of layers that have one."""

    gates: Mapping[int, Tensor]


def with_gates(rows: Mapping[int, tuple[Tensor, Tensor]], values: Values | None) -> Values:
    """Values of longer rows, with the gates that there were."""
    found = _Gated(rows)
    found.gates = getattr(values, "gates", {})
    return found


def extend(mask: Bool[Tensor, "B L"], more: int, *, fill: bool) -> Bool[Tensor, "B L2"]:
    """A mask over `more` further positions."""
    return torch.cat([mask, mask.new_full((mask.shape[0], more), fill)], dim=1)


def _grow(inputs: Mapping[str, Any], tokens: Sequence[Tensor]) -> dict[str, Any]:
    """Model arguments with the tokens appended."""
    ids = torch.cat([inputs["input_ids"], *(t[:, None] for t in tokens)], dim=1)
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    ones = mask.new_ones(len(mask), len(tokens))
    grown = dict(inputs) | {"input_ids": ids, "attention_mask": torch.cat([mask, ones], dim=1)}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in grown:
            types = grown[name]
            grown[name] = torch.cat([types, torch.zeros_like(ones).to(types)], dim=1)
    return grown


def generate_positions(model: Any, inputs: Mapping[str, Any], prompt: int) -> Tensor:
    """Position ids that `generate` gives a sequence whose first `prompt` tokens were the prompt."""
    text = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    if not hasattr(model.model, "rope_deltas"):
        return text
    if inputs.get("image_grid_thw") is None and inputs.get("video_grid_thw") is None:
        return text.expand(3, -1, -1)
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    cut = {k: v[:, :prompt] if k in names else v for k, v in inputs.items()}
    if "video_second_per_grid" in cut:  # what thinkers call it
        cut["second_per_grids"] = cut["video_second_per_grid"]
    known = signature(model.model.get_rope_index).parameters
    start, _ = model.model.get_rope_index(**{k: v for k, v in cut.items() if k in known})
    # generate counts on from the last position of the prompt, on each axis; behind a long video
    # neither the rope index of the longer sequence nor the rope delta says the same
    new = torch.arange(1, text.shape[1] - prompt + 1, device=text.device)
    return torch.cat([start, start[..., -1:] + new], dim=-1)
