"""Tokenizer and processor of the reference model; both are built here, nothing is downloaded."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    BatchFeature,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from vispress.reference.model import qwen
from vispress.reference.world.scenes import IMAGE_SIZE, PATCH_SIZE
from vispress.reference.world.words import BOS, EOS, IMAGE, PAD, SPECIAL, UNKNOWN, VIDEO, WORD_ID


def build_tokenizer(
    ids: Mapping[str, int] = WORD_ID, extra: Mapping[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer that puts `<s>` first and pads on the left.

    Args:
        ids: Word to token id.
        extra: Further special tokens: name of the tokenizer's attribute to token.

    Returns:
        The tokenizer; the picture's placeholder is `<image>`.
    """
    special = {"image_token": IMAGE, **(extra or {})}
    tokenizer = Tokenizer(WordLevel(dict(ids), unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([*SPECIAL, *(extra or {}).values()])
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        extra_special_tokens=special,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> LlavaProcessor:
    """Build a `LlavaProcessor` whose image side needs Pillow only (no torchvision)."""
    images = CLIPImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


class PicturesProcessor(Qwen2_5_VLProcessor):  # type: ignore[misc]
    """A `Qwen2_5_VLProcessor` without torchvision, which transformers' own asks for.

    Args:
        image_processor: Makes patches.
        tokenizer: Has `image_token`.
        chat_template: Of conversations; None for none.
    """

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None
    ) -> None:
        self.image_token = tokenizer.image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        # past the parent, which would want a video processor
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self,
        images: Any = None,
        text: Sequence[str] | None = None,
        videos: Sequence[NDArray[np.uint8]] | None = None,
        *,
        videos_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Process pictures, videos and texts into inputs of the model.

        Args:
            images: Pictures, in the order of their marks.
            text: Prompts.
            videos: uint8 (F, height, width, 3) each, `qwen.FPS` frames a second, likewise.
            videos_kwargs: For the image processor, which makes the patches of frames.
            **kwargs: As of `Qwen2_5_VLProcessor`; with videos, `return_tensors="pt"`.

        Raises:
            ValueError: There are more or fewer marks than videos.
        """
        if videos is None:
            return super().__call__(images=images, text=text, **kwargs)
        marks = sum(prompt.count(VIDEO) for prompt in text or ())
        if marks != len(videos):
            raise ValueError(f"the prompts have {marks} {VIDEO} marks for {len(videos)} videos")
        pixels, grids = self._steps(videos, videos_kwargs or {})
        counts = iter((grids.prod(1) // self.image_processor.merge_size**2).tolist())
        expanded = [
            re.sub(VIDEO, lambda _: " ".join([VIDEO] * next(counts)), prompt)
            for prompt in text or ()
        ]
        made = super().__call__(images=images, text=expanded, **kwargs)
        video = made["input_ids"] == self.tokenizer.convert_tokens_to_ids(VIDEO)
        types = made.get("mm_token_type_ids", torch.zeros_like(made["input_ids"]))
        made["mm_token_type_ids"] = types.masked_fill(video, 2)
        seconds = torch.full((len(videos),), self.image_processor.temporal_patch_size / qwen.FPS)
        made["pixel_values_videos"], made["video_grid_thw"] = pixels, grids
        made["second_per_grid_ts"] = seconds
        return made

    def _steps(
        self, videos: Sequence[NDArray[np.uint8]], options: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Cut videos into temporal patches [S, 3 * t * P * P], with the grids of videos, [V, 3]."""
        size = self.image_processor.temporal_patch_size
        pixels, grids = [], []
        for video in videos:
            # the last frame stands for those that are missing
            frames = [*video, *[video[-1]] * (-len(video) % size)]
            made = self.image_processor(images=frames, return_tensors="pt", **options)
            # a picture is equal frames: of each, the first
            of_frame = made["pixel_values"].unflatten(1, (3, size, -1))[:, :, 0]
            steps = of_frame.unflatten(0, (len(frames) // size, size, -1)).movedim(1, 3)
            pixels.append(steps.flatten(2).flatten(0, 1))
            height, width = made["image_grid_thw"][0, 1:].tolist()
            grids.append([len(frames) // size, height, width])
        return torch.cat(pixels), torch.tensor(grids)


def build_qwen_processor() -> PicturesProcessor:
    """Build the processor of the Qwen reference; its image side needs Pillow only.

    Pictures of 84 to 120 pixels keep their size, rounded to visual tokens of 12 pixels.
    """
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 84 * 84, "longest_edge": 120 * 120},
        patch_size=qwen.PATCH,
        merge_size=qwen.MERGE,
        temporal_patch_size=2,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    extra = {
        "vision_bos_token": qwen.VISION_START,
        "vision_eos_token": qwen.VISION_END,
        "video_token": VIDEO,
    }
    return PicturesProcessor(images, build_tokenizer(qwen.QWEN_ID, extra))


def with_marks(processor: Any, prompt: str) -> str:
    """Write a prompt as a processor's model wants it: Qwen has pictures between two marks.

    Args:
        processor: Of a reference model, or of Qwen's.
        prompt: With `<image>` for each picture and `<video>` for each video.

    Returns:
        The prompt, changed only where the tokenizer knows marks.
    """
    tokenizer = processor.tokenizer
    start = getattr(tokenizer, "vision_bos_token", None)
    if start is None:
        return prompt
    end = tokenizer.vision_eos_token
    for mark, token in ((IMAGE, tokenizer.image_token), (VIDEO, tokenizer.video_token)):
        prompt = prompt.replace(mark, f"{start}{token}{end}")
    return prompt
