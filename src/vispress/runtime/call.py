"""What a base model's forward was called with: one entry a running call, in the calling context."""

import weakref
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from vispress.adapters.base import Modality
from vispress.errors import CompressionStateError
from vispress.runtime.capture import CAPTURE_ATTRIBUTE, Capture

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


def capture_of(attachment: "Attachment", modality: Modality, output: Any) -> Capture:
    """What was seen when these features were computed (by `generate`, ahead of the forward)."""
    capture: Capture | None = getattr(output, CAPTURE_ATTRIBUTE, None)
    if capture is None:  # accelerate rebuilds containers on their way to a device
        seen = LATEST.get().get((id(attachment), modality))
        latest = None if seen is None else seen()
        if latest is not None and latest.gave(attachment.adapter.features(modality, output)):
            capture = latest
    if capture is None:
        raise CompressionStateError(
            f"{modality} features were computed apart from this forward (chunked prefill with "
            "prefill_chunk_size, or before compress_model): the signals that compression "
            "reads are "
            "missing. Pass pixel values, or let generate encode them"
        )
    return capture
