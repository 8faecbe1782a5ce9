"""Mistral 3: a Pixtral encoder, which takes every size; rows of an image end with a token."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.families import Family
from tests.tiny_models import IMAGE_ID, MERGE, PATCH, VISION_END, VISION_START

ROW_END, IMAGE_END = VISION_START, VISION_END


def _draw(part: Any, alone: bool, batch: Any, draw: Callable[..., Tensor]) -> None:
    """A unit of the part is a token of 2 x 2 patches."""
    size = (part.h * MERGE * PATCH, part.w * MERGE * PATCH)
    batch.sizes.append(size)
    batch.pixels.append(draw(3, *size))


def _spell(part: Any, count: int) -> list[int]:
    rows = [[IMAGE_ID] * part.w + [ROW_END] for _ in range(part.h)]
    assert count == part.h * part.w
    return [*[token for row in rows for token in row][:-1], IMAGE_END]


def _pixels(batch: Any, dtype: torch.dtype) -> dict[str, Any]:
    if not batch.pixels:
        return {}
    h, w = (max(edges) for edges in zip(*batch.sizes, strict=True))
    padded = torch.zeros(len(batch.pixels), 3, h, w, dtype=dtype)
    for image, pixels in zip(padded, batch.pixels, strict=True):
        image[:, : pixels.shape[1], : pixels.shape[2]] = pixels
    return {"pixel_values": padded, "image_sizes": torch.tensor(batch.sizes)}


FAMILIES = (
    Family(
        name="mistral3",
        like="llava",
        model="Mistral3",
        text=lambda layers: {"model_type": "mistral", "sliding_window": None},
        vision={
            "model_type": "pixtral",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "patch_size": PATCH,
            "image_size": 64,
        },
        special={"spatial_merge_size": MERGE},
        ids=("image_token_index",),
        own=True,
        draw=_draw,
        spell=_spell,
        pixels=_pixels,
    ),
)
