"""Tokenizer and processor of the reference model; both are built here, nothing is downloaded."""

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import LlavaProcessor, PreTrainedTokenizerFast, Qwen2_5_VLProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from vispress.reference import qwen
from vispress.reference.scenes import IMAGE_SIZE, PATCH_SIZE
from vispress.reference.words import BOS, EOS, IMAGE, PAD, SPECIAL, UNKNOWN, WORD_ID


def build_tokenizer(
    ids: Mapping[str, int] = WORD_ID, extra: Mapping[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that puts `<s>` first and pads on the left.

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
    """A `LlavaProcessor` whose image side needs Pillow only (no torchvision)."""
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
    """A `Qwen2_5_VLProcessor` without videos: transformers' own asks for torchvision.

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


def build_qwen_processor() -> PicturesProcessor:
    """The processor of the Qwen reference; its image side needs Pillow only, it takes no videos.

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
        "video_token": qwen.VIDEO,
    }
    return PicturesProcessor(images, build_tokenizer(qwen.QWEN_ID, extra))


def with_marks(processor: Any, prompt: str) -> str:
    """A prompt as a processor's model wants it: Qwen's pictures stand between two marks.

    Args:
        processor: Of a reference model, or of Qwen's.
        prompt: With `<image>` for each picture.

    Returns:
        The prompt, changed only where the tokenizer knows marks.
    """
    tokenizer = processor.tokenizer
    start = getattr(tokenizer, "vision_bos_token", None)
    if start is None:
        return prompt
    return prompt.replace(IMAGE, f"{start}{tokenizer.image_token}{tokenizer.vision_eos_token}")
