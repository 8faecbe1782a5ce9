"""Act at the stages of a model: one file a stage, under the protocol of `stages.base`."""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from vispress.adapters.decoder import linear_layers
from vispress.errors import UnsupportedMethodError
from vispress.runtime.forward.attention_reads import attention_layers
from vispress.runtime.forward.check_reads import check_reads


@cache
def stage_files() -> tuple[Any, ...]:
    """Modules of this package that make a stage: all that have a function `bind`."""
    names = (module.name for module in iter_modules(__path__) if module.name != "base")
    modules = [import_module(f"{__name__}.{name}") for name in names]
    return tuple(module for module in modules if hasattr(module, "bind"))


def bind_all(binding: Any) -> tuple[Any, ...]:
    """Make the stages of a chain on a model, in the order they act.

    Args:
        binding: A `stages.base.Binding`; remarks of the stages are added to its notes.

    Raises:
        VispressError: The chain cannot work on this model; says what would.
    """
    layers = len(binding.adapter.decoder_layers)
    check_reads(binding.methods, binding.placements, layers)
    found = (module.bind(binding) for module in stage_files())
    stages = sorted((stage for stage in found if stage is not None), key=lambda s: s.order)
    _refuse_linear(binding, stages)
    for stage in stages:
        if stage.refuse is not None:
            stage.refuse(binding.adapter.language_model.config._attn_implementation, None)
    return tuple(stages)


def _refuse_linear(binding: Any, stages: Any) -> None:
    """Refuse what needs the attention, the keys or the gates of layers with linear attention.

    Raises:
        UnsupportedMethodError: Names the layers, and where a method may act.
    """
    linear = linear_layers(binding.adapter.layer_types)
    if not linear:
        return
    full = sorted({*range(len(binding.adapter.decoder_layers))} - linear)
    kind = "linear attention: a state, and no attention weights, keys or values to"
    for bound in binding.placements:
        place = bound.placement
        met = sorted(linear & {*attention_layers(place), *place.transitions})
        if met:
            raise UnsupportedMethodError(
                f"{bound.method.name} reads the attention of decoder layer {met[0]}, which has "
                f"{kind} read; layers {', '.join(map(str, full))} have some: act one layer behind "
                "those, or before the LLM"
            )
    for stage in stages:
        met = sorted(linear & (stage.watched_layers | stage.gated_layers | stage.mlp_layers))
        if met:
            names = " and ".join(dict.fromkeys(method.name for method in binding.methods))
            raise UnsupportedMethodError(
                f"{names} acts in the attention, the cache or the MLP of decoder layer {met[0]}, "
                f"which has {kind} mask or evict; layers {', '.join(map(str, full))} have some. "
                "Methods that drop tokens before the LLM (divprune) or between its layers work"
            )
