"""Random-weight models with the true 7B shapes, built on the device, and prompts for them."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor

IMAGE_ID, START_ID, END_ID, VIDEO_ID = 7, 8, 9, 10
"""Placeholders and vision bounds; the prompts' text uses none of them."""
TEXT_BEFORE, TEXT_AFTER = 32, 32

_LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
}
_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_QWEN_TEXT = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 128000,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [16, 24, 24],
    },
}
_QWEN_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


@dataclass(frozen=True)
class Shape:
    """A model and one image, or one video, for it.

    Args:
        name: For tables.
        family: Of the adapters.
        text: Text config.
        vision: Vision config.
        image: LLaVA-NeXT: pixels of the image's edges; Qwen: patches of them.
        visual: Visual tokens of it.
        crops: Encoder sequences of one image.
        frames: Frames that the encoder sees of a video (each two of the film's); 0: an image.
    """

    name: str
    family: str
    text: dict[str, Any]
    vision: dict[str, Any]
    image: int
    visual: int
    crops: int = 1
    frames: int = 0


SHAPES = {
    "llava_1_5_7b": Shape("llava_1_5_7b", "llava", _LLAMA, _CLIP, 336, 576),
    "llava_next_7b": Shape("llava_next_7b", "llava_next", _LLAMA, _CLIP, 672, 2928, crops=5),
    "qwen2_5_vl_7b": Shape("qwen2_5_vl_7b", "qwen2_5_vl", _QWEN_TEXT, _QWEN_VISION, 72, 1296),
    "qwen2_5_vl_7b_video": Shape(
        "qwen2_5_vl_7b_video", "qwen2_5_vl", _QWEN_TEXT, _QWEN_VISION, 64, 16384, frames=16
    ),
}

_SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
_SMALL_TEXT = _SMALL | {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
_SMALL_CLIP = _CLIP | {**_SMALL, "hidden_size": 32, "num_attention_heads": 4, "image_size": 84}
_SMALL_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_SMALL_QWEN = (
    _QWEN_TEXT | _SMALL_TEXT | {"rope_parameters": _SMALL_ROPE},
    _QWEN_VISION
    | {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4}
    | {"out_hidden_size": 64, "fullatt_block_indexes": [1]},
)
TINY_SHAPES = {
    "llava_1_5_7b": Shape(
        "llava_1_5_7b", "llava", _LLAMA | _SMALL_TEXT, _SMALL_CLIP, 84, 36
    ),
    "qwen2_5_vl_7b": Shape("qwen2_5_vl_7b", "qwen2_5_vl", *_SMALL_QWEN, 12, 36),
    "qwen2_5_vl_7b_video": Shape(
        "qwen2_5_vl_7b_video", "qwen2_5_vl", *_SMALL_QWEN, 8, 64, frames=4
    ),
}  # fmt: skip

_CPU_TEXT = _LLAMA | {"hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 24}
_CPU_TEXT |= {"num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 8192}
CPU_SHAPE = Shape(
    "llava_300m", "llava", _CPU_TEXT, _CLIP | {"num_hidden_layers": 12}, 336, 576
)  # fmt: skip
"""About 320M parameters, 150M of them the encoder: what a CPU prefills in seconds."""

_CLASSES = {
    "llava": ("LlavaConfig", "LlavaForConditionalGeneration"),
    "llava_next": ("LlavaNextConfig", "LlavaNextForConditionalGeneration"),
    "qwen2_5_vl": ("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration"),
}


def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
    """The model in eval mode under SDPA; weights are drawn on the device (normal, 0.02)."""
    config_name, class_name = _CLASSES[shape.family]
    special: dict[str, Any] = {"image_token_index": IMAGE_ID}
    if shape.family == "llava_next":
        special["image_grid_pinpoints"] = _PINPOINTS
    if shape.family == "qwen2_5_vl":
        special = {"image_token_id": IMAGE_ID, "vision_start_token_id": START_ID}
        special |= {"vision_end_token_id": END_ID, "video_token_id": VIDEO_ID}
    config = getattr(hf, config_name)(
        text_config=shape.text, vision_config=shape.vision, tie_word_embeddings=False, **special
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = getattr(hf, class_name)._from_config(
            config, attn_implementation="sdpa", dtype=dtype
        )
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval().requires_grad_(False)


def text_ids(shape: Shape, length: int, batch: int, device: torch.device) -> Tensor:
    """`[batch, length]` random text, without special ids and the last word."""
    high = shape.text["vocab_size"] - 1
    return torch.randint(11, high, (batch, length), device=device)


def prompt(shape: Shape, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `model(**inputs)`: text, one image or video, text, in every sample; no padding.

    Behind it stands the last word, which methods with gist tokens take for one.
    """
    placeholder = VIDEO_ID if shape.frames else IMAGE_ID
    image = torch.full((batch, shape.visual), placeholder, device=device)
    bounds = torch.tensor([START_ID], device=device).expand(batch, 1)
    parts = [text_ids(shape, TEXT_BEFORE, batch, device), image]
    qwen = shape.family == "qwen2_5_vl"
    if qwen:
        parts.insert(1, bounds)
        parts.append(torch.full_like(bounds, END_ID))
    after = text_ids(shape, TEXT_AFTER, batch, device)
    after[:, 0] = shape.text["vocab_size"] - 1
    ids = torch.cat([*parts, after], dim=1)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if qwen:
        frames, what = max(shape.frames, 1), "video" if shape.frames else "image"
        patches = frames * shape.image**2
        pixels = torch.randn(batch * patches, 3 * 2 * 14 * 14, device=device).to(dtype)
        grid = torch.tensor([[frames, shape.image, shape.image]] * batch, device=device)
        inputs["mm_token_type_ids"] = (ids == placeholder).int() * (2 if shape.frames else 1)
        name = "pixel_values_videos" if shape.frames else "pixel_values"
        return inputs | {f"{what}_grid_thw": grid, name: pixels}
    side = shape.vision["image_size"]
    if shape.family == "llava_next":
        pixels = torch.randn(batch, shape.crops, 3, side, side, device=device)
        inputs["image_sizes"] = torch.tensor([[shape.image] * 2] * batch, device=device)
    else:
        pixels = torch.randn(batch, 3, side, side, device=device)
    return inputs | {"pixel_values": pixels.to(dtype)}


def text_prompt(shape: Shape, length: int, batch: int, device: torch.device) -> dict[str, Any]:
    """A prompt of `length` text tokens: what the removed tokens allow at best."""
    ids = text_ids(shape, length, batch, device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
