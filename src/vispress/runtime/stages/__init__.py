"""Act at the stages of a model: one file a stage, under the protocol of `stages.base`."""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

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
    for stage in stages:
        if stage.refuse is not None:
            stage.refuse(binding.adapter.language_model.config._attn_implementation, None)
    return tuple(stages)
