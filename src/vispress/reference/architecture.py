"""What the training script must know about a reference architecture, and the two there are."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

from torch import Tensor, nn

from vispress.reference.attention import FULL, PACKED
from vispress.reference.dense import DenseBatch, DenseHeads, Seen, collate
from vispress.reference.model import (
    TEXT_WIDTH,
    VISION_WIDTH,
    build_model,
    encode_image,
    normalise,
    reference_config,
)
from vispress.reference.processor import build_processor, build_qwen_processor
from vispress.reference.qwen import build_qwen, encode_qwen, qwen_config
from vispress.reference.qwen_data import collate_tokens, side_of
from vispress.reference.scenes import Scene


class Architecture(ABC):
    """One family of models that `train_reference` can train."""

    name: ClassVar[str]
    model_class: ClassVar[str]  # of transformers
    processor_class: ClassVar[str]

    @abstractmethod
    def build(self, config: Mapping[str, int], seed: int) -> Any:
        """A freshly initialised model; `config` sets `vision_layers` and `text_layers`."""

    @abstractmethod
    def heads(self) -> DenseHeads:
        """Heads for its dense labels."""

    @abstractmethod
    def processor(self) -> Any:
        """Its processor."""

    @abstractmethod
    def parts(self, model: Any) -> dict[str, nn.Module]:
        """Projector and vision side, in the order the optimiser takes them."""

    @abstractmethod
    def collate(self, scenes: Sequence[Scene], seed: int, step: int) -> DenseBatch:
        """The batch of a step; `seed` and `step` may choose a resolution."""

    @abstractmethod
    def look(self, model: Any, pixels: Tensor) -> Seen:
        """What the vision side makes of uint8 pixels (B, S, S, 3)."""

    @abstractmethod
    def for_training(self, model: Any) -> None:
        """Switch to the attention functions of packed training."""


class LlavaReference(Architecture):
    """CLIP encoder with [CLS], MLP projector, Llama."""

    name = "llava"
    model_class = "LlavaForConditionalGeneration"
    processor_class = "LlavaProcessor"

    def build(self, config: Mapping[str, int], seed: int) -> Any:
        """See `Architecture.build`."""
        return build_model(reference_config(**config), seed=seed)

    def heads(self) -> DenseHeads:
        """With [CLS]."""
        return DenseHeads(TEXT_WIDTH, VISION_WIDTH)

    def processor(self) -> Any:
        """See `build_processor`."""
        return build_processor()

    def parts(self, model: Any) -> dict[str, nn.Module]:
        """The tower and the projector."""
        return {
            "vision": model.model.vision_tower,
            "projector": model.model.multi_modal_projector,
        }

    def collate(self, scenes: Sequence[Scene], seed: int, step: int) -> DenseBatch:
        """All pictures have 96 x 96 pixels."""
        return collate(list(scenes))

    def look(self, model: Any, pixels: Tensor) -> Seen:
        """Features know their places from the encoder's table of positions."""
        features, cls, last = encode_image(model, normalise(pixels))
        return Seen(features, features, cls, last)

    def for_training(self, model: Any) -> None:
        """Encoder and decoder."""
        model.model.vision_tower.set_attn_implementation(FULL)
        model.model.language_model.set_attn_implementation(PACKED)


class QwenReference(Architecture):
    """Window attention, 2 x 2 merger, M-RoPE, dynamic resolution."""

    name = "qwen2_5_vl"
    model_class = "Qwen2_5_VLForConditionalGeneration"
    processor_class = "Qwen2_5_VLProcessor"

    def build(self, config: Mapping[str, int], seed: int) -> Any:
        """See `Architecture.build`."""
        return build_qwen(qwen_config(**config), seed=seed)

    def heads(self) -> DenseHeads:
        """Without [CLS]."""
        return DenseHeads(TEXT_WIDTH, None)

    def processor(self) -> Any:
        """See `build_qwen_processor`."""
        return build_qwen_processor()

    def parts(self, model: Any) -> dict[str, nn.Module]:
        """The merger counts as the projector, not as part of the encoder that holds it."""
        return {"projector": model.model.visual.merger, "vision": model.model.visual}

    def collate(self, scenes: Sequence[Scene], seed: int, step: int) -> DenseBatch:
        """All pictures of a step have one of four sizes."""
        return collate_tokens(list(scenes), side_of(seed, step))

    def look(self, model: Any, pixels: Tensor) -> Seen:
        """Rotary positions are relative: nothing in the encoder knows where it is."""
        return Seen(encode_qwen(model, pixels))

    def for_training(self, model: Any) -> None:
        """The decoder; `encode_qwen` stands for the encoder."""
        model.model.language_model.set_attn_implementation(PACKED)


ARCHITECTURES: Final[dict[str, Architecture]] = {
    each.name: each for each in (LlavaReference(), QwenReference())
}
