"""Adapters at their public path: the class to fill in, and its registration.

The class stands in `model_adapter`, registration and look-up in `registry`.
"""

from vispress.adapters.model_adapter import ModelAdapter, raster
from vispress.adapters.registry import find_adapter, list_families, register_adapter
from vispress.adapters.values import Encode, EncoderBlock, Grid, Modality

__all__ = [
    "Encode",
    "EncoderBlock",
    "Grid",
    "Modality",
    "ModelAdapter",
    "find_adapter",
    "list_families",
    "raster",
    "register_adapter",
]
