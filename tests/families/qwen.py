"""Qwen3-VL-MoE, Qwen3.5 and Qwen3.5-MoE: most layers of the last two have linear attention."""

from collections.abc import Callable, Mapping
from typing import Any

from tests.delta_rule import put_in
from tests.families import Family

_ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_STATES = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


def _hybrid(family: str, full: tuple[int, ...], **more: Any) -> Callable[[int], Mapping[str, Any]]:
    """Settings of a language model of which some layers have attention weights."""

    def text(layers: int) -> Mapping[str, Any]:
        put_in(family)
        kinds = ["full_attention" if at in full else "linear_attention" for at in range(layers)]
        rope = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 3, 3]}
        rope |= {"mrope_interleaved": True, "partial_rotary_factor": 1.0}
        return {"layer_types": kinds, "rope_parameters": rope} | _STATES | more

    return text


FAMILIES = (
    Family(
        name="qwen3_vl_moe",
        like="qwen3_vl",
        model="Qwen3VLMoe",
        text=lambda layers: _ROUTED,
        ids=("image_token_id", "video_token_id"),
        videos=True,
    ),
    Family(  # layers whose attention most methods read have some
        name="qwen3_5",
        like="qwen3_vl",
        model="Qwen3_5",
        text=_hybrid("qwen3_5", (0, 2, 3)),
        ids=("image_token_id", "video_token_id"),
        videos=True,
        rounds=True,
        hybrid=True,
        needs="5.24",
    ),
    Family(  # as checkpoints have it
        name="qwen3_5_moe",
        like="qwen3_vl",
        model="Qwen3_5Moe",
        text=_hybrid("qwen3_5_moe", (3,), **_ROUTED, shared_expert_intermediate_size=24),
        ids=("image_token_id", "video_token_id"),
        videos=True,
        rounds=True,
        hybrid=True,
        needs="5.24",
    ),
)
