"""What the runtime takes a decoder to be: parts of a layer, kinds of attention."""

import inspect
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vispress.errors import UnsupportedModelError

FULL: Final = "full_attention"
SLIDING: Final = "sliding_attention"
CHUNKED: Final = "chunked_attention"
LINEAR: Final = "linear_attention"
"""Gated delta nets (Qwen3.5): a state that rows write to, in place of keys and values."""
_PARTS = ("input_layernorm", "mlp")
_DELTA_NETS = ("Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet")
_GATED_MLP = ("gate_proj", "up_proj", "down_proj", "act_fn")
_WORKS = (
    "Llama-like decoders (Llama, Mistral, Qwen) work, whose layers all have full, sliding-window "
    "or chunked attention over keys of their own"
)


def layer_types(config: Any, count: int) -> tuple[str, ...]:
    """Name the kind of attention of each decoder layer, as transformers does.

    Args:
        config: The language model's.
        count: Its decoder layers.

    Raises:
        UnsupportedModelError: The config names the kinds of fewer layers than there are.
    """
    declared: Sequence[str] | None = getattr(config, "layer_types", None)
    if declared is None:  # models of one kind of layer say it by these settings alone
        if getattr(config, "sliding_window", None) is not None:
            return (SLIDING,) * count
        return (FULL if getattr(config, "attention_chunk_size", None) is None else CHUNKED,) * count
    if len(declared) < count:
        raise UnsupportedModelError(
            f"config.layer_types names {len(declared)} of {count} decoder layers; name every layer"
        )
    return tuple(declared[:count])


def window_of(config: Any, kind: str) -> int | None:
    """Give the number of positions that a layer of some kind sees; None for all."""
    names = {SLIDING: "sliding_window", CHUNKED: "attention_chunk_size"}
    return getattr(config, names[kind], None) if kind in names else None


def mlp_branch(layer: Any) -> Any:
    """Find the module whose output a decoder layer adds to its rows behind the attention.

    The MLP, or the norm behind it (Gemma, OLMo 2, GLM), which would undo a factor in front of it.
    """
    names = ("post_feedforward_layernorm", "post_mlp_layernorm", "mlp")
    return next(getattr(layer, name) for name in names if hasattr(layer, name))


def linear_layers(kinds: Sequence[str]) -> frozenset[int]:
    """Find the decoder layers that have a state in place of keys and values."""
    return frozenset(number for number, kind in enumerate(kinds) if kind == LINEAR)


def first_attention(layers: Sequence[Any]) -> nn.Module:
    """Give the attention of the first decoder layer that has one."""
    found: nn.Module = next(x.self_attn for x in layers if hasattr(x, "self_attn"))
    return found


def has_rotary_by_type(language_model: Any) -> bool:
    """Tell whether each kind of layer has rotary tables of its own (Gemma 3)."""
    return "layer_type" in inspect.signature(language_model.rotary_emb.forward).parameters


def check_decoder(family: str, language_model: Any, layers: Sequence[Any]) -> None:
    """Refuse language models of which some layer is not built as the runtime takes it to be.

    Raises:
        UnsupportedModelError: Names what is missing, or the kind of layer, and what works.
    """
    name = f"{family} with {type(language_model).__name__} is not supported"
    missing = [] if hasattr(language_model, "rotary_emb") else ["rotary_emb"]
    for number, layer in enumerate(layers):
        mixer = "linear_attn" if _is_delta_net(layer) else "self_attn"
        parts = (_PARTS[0], mixer, _PARTS[1])
        lacks = [part for part in parts if not hasattr(layer, part)] + missing
        if lacks:
            where = f"layer {number} ({type(layer).__name__}) " if number else ""
            raise UnsupportedModelError(
                f"{name}: its decoder {where}has no {', '.join(lacks)}; {_WORKS}"
            )
    config = language_model.config
    for number, kind in enumerate(layer_types(config, len(layers))):
        if kind not in (FULL, SLIDING, CHUNKED) and not (
            kind == LINEAR and _is_delta_net(layers[number])
        ):
            raise UnsupportedModelError(f"{name}: decoder layer {number} is {kind!r}; {_WORKS}")
    if getattr(config, "num_kv_shared_layers", 0):
        raise UnsupportedModelError(
            f"{name}: its last {config.num_kv_shared_layers} layers use keys and values of earlier "
            f"ones (num_kv_shared_layers), which may hold other tokens; {_WORKS}"
        )
    both = getattr(config, "use_bidirectional_attention", None) in (True, "all")
    if both or getattr(config, "is_causal", None) is False:
        setting = "use_bidirectional_attention" if both else "is_causal"
        raise UnsupportedModelError(
            f"{name} with {setting}={getattr(config, setting)!r}: text must be causal, since what "
            "is kept must not depend on the answer"
        )


def _is_delta_net(layer: Any) -> bool:
    """Whether a decoder layer's rows meet in a state that is known."""
    return type(getattr(layer, "linear_attn", None)).__name__ in _DELTA_NETS


def check_gated_mlp(family: str, number: int, layer: Any) -> int:
    """Count the intermediate neurons of a decoder layer's MLP, if it is a gated one.

    Args:
        family: Of the model.
        number: The layer.
        layer: Its module.

    Raises:
        UnsupportedModelError: The MLP has not the three projections of `down(act(gate) * up)`.
    """
    lacks = [part for part in _GATED_MLP if not hasattr(layer.mlp, part)]
    if lacks or not hasattr(layer.mlp.gate_proj, "out_features"):
        raise UnsupportedModelError(
            f"{family}: the MLP of decoder layer {number} ({type(layer.mlp).__name__}) has no "
            f"{', '.join(lacks) or 'gate_proj.out_features'}, so its neurons cannot be told apart; "
            "gated MLPs of three projections (Llama, Mistral, Qwen) work, or ffn_ratio=1"
        )
    return int(layer.mlp.gate_proj.out_features)


def run_neurons(mlp: Any, hidden: Tensor, count: int) -> Tensor:
    """Run a gated MLP on its first intermediate neurons alone.

    Plain projections are run by slices of their weights. Others (adapters, quantised or offloaded
    weights) run whole, and the other neurons are left out behind the activation.

    Args:
        mlp: The module.
        hidden: `[..., D]`.
        count: Neurons.

    Raises:
        UnsupportedModelError: The neurons are dealt out to several processes.
    """
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    if all(_plain(each) for each in (gate, up, down)):
        inner = mlp.act_fn(_first_rows(gate, hidden, count)) * _first_rows(up, hidden, count)
        return F.linear(inner, down.weight[:, :count], down.bias)
    inner = mlp.act_fn(gate(hidden)) * up(hidden)
    if inner.shape[-1] != gate.out_features:
        raise UnsupportedModelError(
            f"this process has {inner.shape[-1]} of {gate.out_features} neurons of an MLP (tensor "
            "parallelism), of which visual tokens go through the first ones; set ffn_ratio=1"
        )
    rest = inner.new_zeros(()).expand(*inner.shape[:-1], inner.shape[-1] - count)
    return down(torch.cat([inner[..., :count], rest], dim=-1))  # type: ignore[no-any-return]


def _plain(linear: Any) -> bool:
    """Whether what a projection computes is its weight and bias, both here."""
    if type(linear) is not nn.Linear or "forward" in linear.__dict__:
        return False
    hooked = linear._forward_hooks or linear._forward_pre_hooks
    weight = linear.weight
    whole = weight.shape == (linear.out_features, linear.in_features)
    return not hooked and type(weight) in (nn.Parameter, Tensor) and not weight.is_meta and whole


def _first_rows(linear: nn.Linear, hidden: Tensor, count: int) -> Tensor:
    bias = None if linear.bias is None else linear.bias[:count]
    return F.linear(hidden, linear.weight[:count], bias)
