"""Folders with tiny random models, as `save_pretrained` leaves them."""

import string
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from tests.tiny_models import (
    IMAGE_ID,
    MERGE,
    PAD,
    PATCH,
    VIDEO_ID,
    VISION_END,
    VISION_START,
    VOCAB,
    build,
)

CHECKPOINTS = ("llava", "qwen2_5_vl", "qwen3_vl")
_IM_START, _IM_END = 124, 125

LLAVA_TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() }}: "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% endif %}"
    "{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if m['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    "{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_checkpoint(family: str, folder: Path, *, layers: int = 4, template: bool = True) -> Path:
    """Write a random model of a family (`CHECKPOINTS`) with a tokenizer of single characters.

    Args:
        family: Which.
        folder: Made if missing.
        layers: Decoder layers.
        template: Whether it has a chat template.

    Returns:
        The folder.
    """
    model = build(family, dtype=torch.float32, layers=layers)
    model.generation_config.eos_token_id = 2 if family == "llava" else _IM_END
    model.save_pretrained(folder)
    chat = LLAVA_TEMPLATE if family == "llava" else QWEN_TEMPLATE
    make = _llava_processor if family == "llava" else _qwen_processor
    make(family, chat if template else None).save_pretrained(folder)
    return folder


def picture(height: int, width: int, seed: int) -> Image.Image:
    """Noise in RGB."""
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def _tokenizer(special: dict[str, int], **names: Any) -> Any:
    letters = dict(zip(string.printable[:97], range(3, 100), strict=True))
    vocabulary = {"<pad>": PAD, "<s>": 1, "</s>": 2, **letters, **special}
    spare = set(range(VOCAB)) - set(vocabulary.values())
    vocabulary |= {f"<spare{i}>": i for i in spare}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=f"<spare{min(spare)}>"))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>", *special])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **names,
    )


def _llava_processor(family: str, template: str | None) -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = _tokenizer(
        {"<image>": IMAGE_ID}, eos_token="</s>", extra_special_tokens={"image_token": "<image>"}
    )
    size = {"height": 24, "width": 24}
    return hf.LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def _qwen_processor(family: str, template: str | None) -> Any:
    special = {
        "<|image_pad|>": IMAGE_ID,
        "<|video_pad|>": VIDEO_ID,
        "<|vision_start|>": VISION_START,
        "<|vision_end|>": VISION_END,
        "<|im_start|>": _IM_START,
        "<|im_end|>": _IM_END,
    }
    tokenizer = _tokenizer(special, eos_token="<|im_end|>")
    grid = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2}
    pixels = {"min_pixels": 8 * 8 * 4, "max_pixels": 8 * 8 * 36}
    video = hf.Qwen2VLVideoProcessor if family == "qwen2_5_vl" else hf.Qwen3VLVideoProcessor
    processor = hf.Qwen2_5_VLProcessor if family == "qwen2_5_vl" else hf.Qwen3VLProcessor
    return processor(
        image_processor=hf.Qwen2VLImageProcessor(**grid, **pixels),
        tokenizer=tokenizer,
        video_processor=video(**grid),
        chat_template=template,
    )
