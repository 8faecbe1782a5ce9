"""Gemma 3: tokens of an image see each other; every other layer sees a window."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tests.families import Family
from tests.tiny_models import IMAGE_ID


def _text(layers: int) -> Mapping[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1000.0}
    both = {"full_attention": rope, "sliding_attention": rope | {"rope_theta": 300.0}}
    kinds = ["sliding_attention", "full_attention"] * layers
    return {
        "model_type": "gemma3_text",
        "rope_parameters": both,
        "sliding_window": 24,
        "layer_types": kinds[:layers],
        "query_pre_attn_scalar": 16,
    }


def _types(ids: Tensor) -> dict[str, Any]:
    return {"token_type_ids": (ids == IMAGE_ID).long()}


FAMILIES = (
    Family(
        name="gemma3",
        like="llava",
        model="Gemma3",
        text=_text,
        vision={"model_type": "siglip_vision_model", "image_size": 32, "vision_use_head": False},
        special={"mm_tokens_per_image": 16},
        extra=_types,
        needs="5.24",
        windowed=True,
        rounds=True,
    ),
)
