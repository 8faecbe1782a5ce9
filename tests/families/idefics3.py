"""Idefics3 and SmolVLM: sub-pictures, each behind a word for its place, the whole one last."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.families import Family
from tests.tiny_models import IMAGE_ID, PATCH, VISION_END, VISION_START

SIDE, TOKENS = 32, 16
"""Pixels of an edge, and visual tokens, of a sub-picture."""


def _parts(part: Any) -> int:
    """A sub-picture has 4 x 4 units; of several, the whole picture comes last."""
    count = -(-part.h // 4) * -(-part.w // 4)
    return count + (count > 1)


def _draw(part: Any, alone: bool, batch: Any, draw: Callable[..., Tensor]) -> None:
    batch.pixels.append(draw(_parts(part), 3, SIDE, SIDE))


def _spell(part: Any, count: int) -> list[int]:
    assert count == TOKENS * _parts(part)
    ids: list[int] = []
    for number in range(_parts(part)):
        ids += [VISION_START, 3 + number] + [IMAGE_ID] * TOKENS
    return [*ids, VISION_END]


def _pixels(batch: Any, dtype: torch.dtype) -> dict[str, Any]:
    if not batch.pixels:
        return {}
    queue, rows = list(batch.pixels), []
    for images in batch.images_per_sample:
        rows.append([part for _ in range(images) for part in queue.pop(0)])
    rows[-1] += [part for more in queue for part in more]
    values = torch.zeros(len(rows), max(map(len, rows)), 3, SIDE, SIDE, dtype=dtype)
    shown = torch.zeros(*values.shape[:2], SIDE, SIDE, dtype=torch.bool)
    for i, row in enumerate(rows):
        if row:
            values[i, : len(row)], shown[i, : len(row)] = torch.stack(row).to(dtype), True
    return {"pixel_values": values, "pixel_attention_mask": shown}


def _apart(model: Any, found: list[Tensor]) -> list[Tensor]:
    return list(torch.cat(found).split(TOKENS))


_IDEFICS3 = Family(
    name="idefics3",
    like="llava",
    model="Idefics3",
    vision={
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "patch_size": PATCH,
        "image_size": SIDE,
    },
    special={"scale_factor": 2},
    own=True,
    split=True,
    draw=_draw,
    spell=_spell,
    pixels=_pixels,
    apart=_apart,
)
FAMILIES = (_IDEFICS3, replace(_IDEFICS3, name="smolvlm", model="SmolVLM"))
