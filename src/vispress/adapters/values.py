"""Values that adapters and the runtime exchange."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

Modality = Literal["image", "video"]
"""Kinds of visual input; each has its own placeholder id and `get_<modality>_features`."""

Grid = tuple[int, int, int]
"""Steps, rows and columns of the visual tokens of a video; an image has one step."""

Encode = Callable[[Sequence[tuple[int, int]], Mapping[str, Any]], Mapping[str, Any]]
"""`encode(sizes, options)` processes a batch again, every image (or frame of a video) resized to
its (height, width) in pixels before; `options` go to the processor."""


@dataclass(frozen=True)
class EncoderBlock:
    """One layer of a vision encoder: `h = x + attention(...)`, then `h + mlp(norm(h))`.

    Args:
        layer: The layer.
        attention: Its attention module (`ALL_ATTENTION_FUNCTIONS`).
        norm: The norm ahead of its MLP.
        mlp: Its MLP, token by token.
    """

    layer: nn.Module
    attention: nn.Module
    norm: nn.Module
    mlp: nn.Module
