"""vispress: pluggable visual-token compression for multimodal LLMs.

Importing is light: transformers, triton and matplotlib are imported when they are first needed.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vispress.adapters.base import register_adapter
    from vispress.api import (
        compress_model,
        compressed,
        compression_report,
        remove_compression,
        update_compression,
    )
    from vispress.capturing import capture
    from vispress.prompts import prompt_lengths
    from vispress.registry import register_method
    from vispress.saving import save_compression
    from vispress.supported import list_methods, unsupported_methods
    from vispress.training import (
        CompressionCallback,
        compression_loss,
        parameter_groups,
        set_progress,
    )

__version__ = "0.2.0"

__all__ = [
    "CompressionCallback",
    "capture",
    "compress_model",
    "compressed",
    "compression_loss",
    "compression_report",
    "list_methods",
    "parameter_groups",
    "prompt_lengths",
    "register_adapter",
    "register_method",
    "remove_compression",
    "save_compression",
    "set_progress",
    "unsupported_methods",
    "update_compression",
]

_HOME = {
    "capture": "vispress.capturing",
    "compress_model": "vispress.api",
    "compressed": "vispress.api",
    "compression_report": "vispress.api",
    "remove_compression": "vispress.api",
    "update_compression": "vispress.api",
    "list_methods": "vispress.supported",
    "prompt_lengths": "vispress.prompts",
    "register_method": "vispress.registry",
    "register_adapter": "vispress.adapters.base",
    "save_compression": "vispress.saving",
    "CompressionCallback": "vispress.training",
    "compression_loss": "vispress.training",
    "parameter_groups": "vispress.training",
    "set_progress": "vispress.training",
    "unsupported_methods": "vispress.supported",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'vispress' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """List the public names, those too that were not imported yet."""
    return sorted({*globals(), *__all__})
