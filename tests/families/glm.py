"""GLM-4.1V, GLM-4.5V and GLM-4.6V: videos stand under the token of images."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tests.families import Family
from tests.tiny_models import IMAGE_ID, VIDEO_ID, VISION_END, VISION_START

_VISION = {
    "depth": 4,
    "num_heads": 4,
    "patch_size": 4,
    "in_channels": 3,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": 64,
    "image_size": 24,
}
_ROPE = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 3, 3]}
_MARKS = {"image_start_token_id": VISION_START, "image_end_token_id": VISION_END}


def _routed(layers: int) -> Mapping[str, Any]:
    """Settings of a language model whose first layer is dense, as in checkpoints."""
    rope = _ROPE | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    return {"rope_parameters": rope, "first_k_dense_replace": 1} | experts


def _one_token(ids: Tensor) -> dict[str, Any]:
    return {"input_ids": ids.masked_fill(ids == VIDEO_ID, IMAGE_ID)}


def _family(name: str, model: str, **more: Any) -> Family:
    return Family(
        name=name,
        like="qwen3_vl",
        model=model,
        own=True,
        special=_MARKS,
        ids=("image_token_id", "video_token_id"),
        extra=_one_token,
        videos=True,
        **{"text": lambda layers: {"rope_parameters": _ROPE}, "vision": _VISION} | more,
    )


FAMILIES = (
    _family("glm4v", "Glm4v"),
    _family("glm4v_moe", "Glm4vMoe", text=_routed),
    _family("glm46v", "Glm46V", vision=_VISION | {"model_type": "glm4v_vision"}),
)

GLM = tuple(family.name for family in FAMILIES)
