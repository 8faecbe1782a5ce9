"""Which methods a model can be compressed by, and why not by the others."""

from torch import nn

from vispress.adapters.base import find_adapter
from vispress.api import plan_of
from vispress.errors import VispressError
from vispress.method_options import make_budgeted
from vispress.registry import list_methods as registered
from vispress.request import Request, signal_gap

_RATIO = 0.5


def list_methods(model: nn.Module | None = None) -> list[str]:
    """List the names of registered methods, sorted.

    Args:
        model: Only those that this model can be compressed by, with their default settings;
            `unsupported_methods` tells why not by the others.

    Raises:
        UnsupportedModelError: No adapter knows the model.
    """
    if model is None:
        return registered()
    refused = unsupported_methods(model)
    return [name for name in registered() if name not in refused]


def unsupported_methods(model: nn.Module) -> dict[str, str]:
    """Tell which registered methods cannot compress a model, and why.

    Each is planned with its default settings, as `compress_model` would, and the model is left as
    it is. One without weights (on the meta device) will do.

    Args:
        model: A supported model, compressed or not.

    Returns:
        Reasons by name, sorted; what a reason says would work is worth trying.

    Raises:
        UnsupportedModelError: No adapter knows the model.
    """
    adapter, found = find_adapter(model), {}
    for name in registered():
        try:
            method = make_budgeted(name, {}, _RATIO)
            if (gap := signal_gap(method, adapter)) is not None:
                found[name] = gap
                continue
            plan_of(model, adapter, Request((method,)))
        except VispressError as error:
            found[name] = str(error)
    return found
