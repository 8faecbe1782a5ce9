"""What a base model's forward was called with: one entry a running call, in the calling context."""

import weakref
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from vispress.adapters.base import Modality
from vispress.runtime.capture import Capture

if TYPE_CHECKING:
    from vispress.runtime.attach import Attachment


@dataclass(eq=False)
class Call:
    """What the base model's forward was called with; lives as long as that call."""

    attachment: "Attachment"
    arguments: Mapping[str, Any]
    captures: dict[Modality, Capture] = field(default_factory=dict)


LATEST: ContextVar[Mapping[tuple[int, Modality], "weakref.ref[Capture]"]] = ContextVar(
    "vispress_latest", default=MappingProxyType({})
)
CALLS: ContextVar[tuple[Call, ...]] = ContextVar("vispress_calls", default=())


def brings_images(kwargs: Mapping[str, Any]) -> bool:
    """Whether a base model is called with something to look at."""
    names = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")
    return any(kwargs.get(name) is not None for name in names)
