"""Cohere2-Vision and Aya Vision: parallel blocks, and a window in every other layer."""

from collections.abc import Mapping
from typing import Any

from tests.families import Family


def _text(layers: int) -> Mapping[str, Any]:
    """Layers with a window have rotary positions, the others have none."""
    kinds = ["sliding_attention", "full_attention"] * layers
    return {
        "model_type": "cohere2",
        "sliding_window": 24,
        "layer_types": kinds[:layers],
        "logit_scale": 1.0,
    }


_VISION = {"model_type": "siglip_vision_model", "image_size": 32, "vision_use_head": False}
FAMILIES = (
    Family(
        name="cohere2_vision",
        like="llava",
        model="Cohere2Vision",
        text=_text,
        vision=_VISION,
        special={"alignment_intermediate_size": 96},
        windowed=True,
        rounds=True,
    ),
    Family(
        name="aya_vision",
        like="llava",
        model="AyaVision",
        text=_text,
        vision=_VISION,
        special={"alignment_intermediate_size": 96, "vision_feature_layer": -2},
        ids=("image_token_index",),
        windowed=True,
        rounds=True,
    ),
)
