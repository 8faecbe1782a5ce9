"""Weights of projectors whose forward is known to be an MLP of two layers, behind a norm or not."""

from typing import Any, Literal

from torch import nn

from vispress.types import PatchNorm, TwoLayer

_GELU: dict[str, Literal["gelu", "gelu_tanh"]] = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
}
_RMS = ("Qwen2_5_VLRMSNorm", "Qwen2RMSNorm", "Qwen2_5OmniRMSNorm")


def two_layer(
    projector: Any, layers: tuple[Any, Any, Any], norm: PatchNorm | None = None
) -> TwoLayer | None:
    """`(linear, GELU, linear)` of a projector by its weights; None where more may happen.

    Args:
        projector: The module, of a class that is known to be nothing but norm and layers.
        layers: The three modules of its MLP.
        norm: What stands before them.
    """
    first, act, second = layers
    activation = _GELU.get(type(act).__name__)
    if type(act) is nn.GELU:
        activation = "gelu" if act.approximate == "none" else "gelu_tanh"
    linear = type(first) is nn.Linear and type(second) is nn.Linear
    if activation is None or not linear or _changed(projector) or not all(map(_plain, layers)):
        return None
    return TwoLayer(
        w1=first.weight,
        b1=first.bias,
        w2=second.weight,
        b2=second.bias,
        activation=activation,
        norm=norm,
    )


def patch_norm(norm: Any, first: Any) -> PatchNorm | None:
    """A LayerNorm or RMS norm of the parts of what a layer is given; None for anything else."""
    layer = type(norm) is nn.LayerNorm
    if not (layer or of_transformers(norm, _RMS)) or not _plain(norm) or norm.weight is None:
        return None
    return PatchNorm(
        patches=first.in_features // len(norm.weight),
        weight=norm.weight,
        bias=norm.bias if layer else None,
        eps=norm.eps if layer else norm.variance_epsilon,
        layer=layer,
    )


def of_transformers(module: Any, names: tuple[str, ...]) -> bool:
    """Tell whether a module is of one of the classes of transformers with these names."""
    return type(module).__module__.startswith("transformers.") and type(module).__name__ in names


def _changed(module: Any) -> bool:
    """Tell whether a call does more than the class's forward (accelerate, adapters, users)."""
    return bool(module._forward_hooks) or "forward" in module.__dict__


def _plain(module: Any) -> bool:
    """Tell whether nothing was added to a module, and its own weights can be read."""
    if module._forward_pre_hooks or _changed(module):
        return False
    weights = module.parameters(recurse=False)
    return all(type(w) is nn.Parameter and not w.is_meta for w in weights)
