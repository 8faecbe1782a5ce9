"""Adapters by the class names of the base models that they serve."""

import difflib
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from vispress.adapters.decoder import check_decoder
from vispress.adapters.model_adapter import ModelAdapter
from vispress.errors import ConfigError, UnsupportedModelError

A = TypeVar("A", bound="type[ModelAdapter]")
_ADAPTERS: dict[str, type[ModelAdapter]] = {}


def register_adapter(*base_classes: str) -> Callable[[A], A]:
    """Decorate an adapter class, which then serves base models by class name.

    Args:
        *base_classes: Names of the base models' classes, or of parents of these.

    Raises:
        ConfigError: No name is given, or a name is served by another adapter.
    """
    if not base_classes:
        raise ConfigError("register_adapter needs at least one base-model class name")

    def add(cls: A) -> A:
        for name in base_classes:
            known = _ADAPTERS.get(name)
            if known is not None and known.__qualname__ != cls.__qualname__:
                raise ConfigError(f"{name} is already served by adapter {known.__qualname__}")
            _ADAPTERS[name] = cls
        cls.base_classes = base_classes
        return cls

    return add


def list_adapters() -> list[type[ModelAdapter]]:
    """List the registered adapter classes, each once, in the order of registration."""
    import vispress.adapters  # noqa: F401  (registers the built-in ones)

    return list(dict.fromkeys(_ADAPTERS.values()))


def list_families(gives: str | None = None) -> list[str]:
    """List the names of the supported model families, sorted.

    Args:
        gives: Only families whose adapter overrides this method of `ModelAdapter`.
    """
    import vispress.adapters  # noqa: F401  (registers the built-in ones)

    adapters = list(_ADAPTERS.values())
    if gives is not None:
        adapters = [a for a in adapters if getattr(a, gives) is not getattr(ModelAdapter, gives)]
    return sorted({adapter.family for adapter in adapters})


def find_adapter(model: nn.Module) -> ModelAdapter:
    """Find the adapter for a model, looking through wrappers (PEFT, pipelines' models, heads).

    Raises:
        UnsupportedModelError: No part of the model is a supported base model.
    """
    import vispress.adapters  # noqa: F401  (registers the built-in ones)

    if not isinstance(model, nn.Module):
        hint = " (pass its .model)" if isinstance(getattr(model, "model", None), nn.Module) else ""
        raise UnsupportedModelError(f"expected a torch module, got {type(model).__name__}{hint}")
    for module in model.modules():
        for parent in type(module).__mro__:
            if parent.__name__ in _ADAPTERS:
                adapter = _ADAPTERS[parent.__name__](module)
                _check_release(adapter)
                check_decoder(adapter.family, adapter.language_model, adapter.decoder_layers)
                adapter.check()
                return adapter
    name = type(model).__name__
    close = difflib.get_close_matches(name, _ADAPTERS, n=1, cutoff=0.6)
    hint = f" (did you mean a model built on {close[0]}?)" if close else ""
    raise UnsupportedModelError(
        f"no adapter for {name}{hint}; supported families: {', '.join(list_families())}. "
        "Add one with @vispress.register_adapter"
    )


def _check_release(adapter: ModelAdapter) -> None:
    """Refuse families that the installed transformers has otherwise than newer ones."""
    import transformers
    from packaging.version import Version

    installed = transformers.__version__
    if Version(installed) < Version(adapter.transformers):
        raise UnsupportedModelError(
            f"{adapter.family} needs transformers {adapter.transformers} or newer, and "
            f"{installed} is installed"
        )
