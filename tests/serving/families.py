"""Folders of tiny random models that vLLM runs: heads of 32, processors of transformers."""

from pathlib import Path
from typing import Any

import torch
import transformers as hf

from tests import tiny_checkpoints
from tests.tiny_models import IMAGE_ID, MERGE, PATCH, VIDEO_ID, VISION_END, VISION_START, build

TEXT = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
_ROPE = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [4, 6, 6]}
_QWEN_MARK = "<|vision_start|><|image_pad|><|vision_end|>"
MARK = {
    "qwen2_vl": _QWEN_MARK,
    "qwen2_5_vl": _QWEN_MARK,
    "qwen3_vl": _QWEN_MARK,
}
"""What stands for a picture in a text."""
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
    raise ValueError(family)


def _qwen(family: str) -> Any:
    marks = {
        "<|image_pad|>": IMAGE_ID,
        "<|video_pad|>": VIDEO_ID,
        "<|vision_start|>": VISION_START,
        "<|vision_end|>": VISION_END,
    }
    tokenizer = tiny_checkpoints._tokenizer(marks, eos_token="</s>")
    grid = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2}
    pixels = {"size": {"shortest_edge": 8 * 8 * 4, "longest_edge": 8 * 8 * 36}}
    kinds = {
        "qwen2_vl": (hf.Qwen2VLProcessor, hf.Qwen2VLVideoProcessor),
        "qwen2_5_vl": (hf.Qwen2_5_VLProcessor, hf.Qwen2VLVideoProcessor),
        "qwen3_vl": (hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor),
    }
    processor, video = kinds[family]
    return processor(
        image_processor=hf.Qwen2VLImageProcessor(**grid, **pixels),
        tokenizer=tokenizer,
        video_processor=video(**grid, **pixels),
    )
