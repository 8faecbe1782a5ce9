"""vLLM's own classes on a release that is not supported: what asks for compression is refused."""

from importlib import import_module
from typing import Any

from vispress.integrations.vllm.releases import ARCHITECTURES, refusal
from vispress.integrations.vllm.spec import KEY


def __getattr__(name: str) -> Any:
    """The class that `ARCHITECTURES` gives this name, made on first use."""
    places = {own: place for place, own in ARCHITECTURES.values()}
    if name not in places:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, base = places[name].partition(":")
    theirs = getattr(import_module(f"vllm.model_executor.models.{module}"), base)
    return refusing(theirs)


def refusing(base: type) -> type:
    """Make a subclass of a model class that is its base, unless it is asked to compress."""

    def begin(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
        if getattr(vllm_config.model_config.hf_config, KEY, None) is not None:
            raise refusal()
        base.__init__(self, vllm_config=vllm_config, prefix=prefix)  # type: ignore[misc]

    return type(base.__name__, (base,), {"__init__": begin, "__module__": __name__})
