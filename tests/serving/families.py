"""Folders of tiny random models that vLLM runs: heads of 32, processors of transformers."""

from pathlib import Path
from typing import Any

import torch
import transformers as hf

from tests import tiny_checkpoints
from tests.tiny_models import (
    _PINPOINTS,
    IMAGE_ID,
    MERGE,
    PATCH,
    VIDEO_ID,
    VISION_END,
    VISION_START,
    build,
)

TEXT = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
_ROPE = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [4, 6, 6]}
_QWEN_MARK = "<|vision_start|><|image_pad|><|vision_end|>"
MARK = {
    "llava_next": "<image>",
    "llava_onevision": "<image>",
    "internvl": "<IMG_CONTEXT>",
    "qwen2_vl": _QWEN_MARK,
    "qwen2_5_vl": _QWEN_MARK,
    "qwen3_vl": _QWEN_MARK,
}
"""What stands for a picture in a text."""
VIDEO_MARK = {
    "internvl": "<video>",
    "qwen3_vl": "<|vision_start|><|video_pad|><|vision_end|>",
    "llava_onevision": "<video>",
    "qwen2_vl": "<|vision_start|><|video_pad|><|vision_end|>",
    "qwen2_5_vl": "<|vision_start|><|video_pad|><|vision_end|>",
}
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def save(family: str, folder: Path) -> tuple[Any, Any]:
    """Write a folder; gives its model and processor."""
    text: dict[str, Any] = dict(TEXT)
    if family in QWEN:
        text["rope_parameters"] = _ROPE | (
            {"mrope_interleaved": True} if family == "qwen3_vl" else {}
        )
    model = build(family, dtype=torch.float32, layers=4, text=text)
    processor = _processor(family)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def _processor(family: str) -> Any:
    if family in QWEN:
        return _qwen(family)
    if family == "internvl":
        return _internvl()
    marks = {"<image>": IMAGE_ID, "<video>": VIDEO_ID}
    named = {"image_token": "<image>", "video_token": "<video>"}
    tokenizer = tiny_checkpoints._tokenizer(marks, eos_token="</s>", extra_special_tokens=named)
    pinpoints = [list(one) for one in _PINPOINTS[family]]
    if family == "llava_next":
        side = {"height": 16, "width": 16}
        return hf.LlavaNextProcessor(
            image_processor=hf.LlavaNextImageProcessor(
                size={"shortest_edge": 16}, crop_size=side, image_grid_pinpoints=pinpoints
            ),
            tokenizer=tokenizer,
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    side = {"height": 20, "width": 20}
    return hf.LlavaOnevisionProcessor(
        image_processor=hf.LlavaOnevisionImageProcessor(size=side, image_grid_pinpoints=pinpoints),
        tokenizer=tokenizer,
        video_processor=hf.LlavaOnevisionVideoProcessor(size=side),
        num_image_tokens=25,
        vision_feature_select_strategy="full",
    )


def _internvl() -> Any:
    marks = {"<IMG_CONTEXT>": IMAGE_ID, "<video>": VIDEO_ID}
    marks |= {"<img>": VISION_START, "</img>": VISION_END}
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = tiny_checkpoints._tokenizer(marks, eos_token="</s>", extra_special_tokens=named)
    side = {"height": 32, "width": 32}
    images = hf.GotOcr2ImageProcessor(size=side, crop_to_patches=True, max_patches=4)
    return hf.InternVLProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        video_processor=hf.InternVLVideoProcessor(size=side),
        image_seq_length=16,
    )


def _qwen(family: str) -> Any:
    marks = {
        "<|image_pad|>": IMAGE_ID,
        "<|video_pad|>": VIDEO_ID,
        "<|vision_start|>": VISION_START,
        "<|vision_end|>": VISION_END,
    }
    tokenizer = tiny_checkpoints._tokenizer(marks, eos_token="</s>")
    grid = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2}
    # vLLM may normalise both on the device, by one mean
    norm = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    pixels = norm | {"size": {"shortest_edge": 8 * 8 * 4, "longest_edge": 8 * 8 * 36}}
    kinds = {
        "qwen2_vl": (hf.Qwen2VLProcessor, hf.Qwen2VLVideoProcessor),
        "qwen2_5_vl": (hf.Qwen2_5_VLProcessor, hf.Qwen2VLVideoProcessor),
        "qwen3_vl": (hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor),
    }
    processor, video = kinds[family]
    return processor(
        image_processor=hf.Qwen2VLImageProcessor(**grid, **pixels),
        tokenizer=tokenizer,
        video_processor=video(**grid, **pixels, do_sample_frames=False),
    )
