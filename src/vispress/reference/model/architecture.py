"""The two reference architectures, as the training script must know them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import LlavaProcessor

from vispress.model_folders import load_part
from vispress.reference.model.attention import FULL, PACKED
from vispress.reference.model.dense import DenseBatch, DenseHeads, Seen, collate
from vispress.reference.model.llava import (
    TEXT_WIDTH,
    VISION_WIDTH,
    build_model,
    encode_image,
    normalise,
    reference_config,
)
from vispress.reference.model.processor import (
    PicturesProcessor,
    build_processor,
    build_qwen_processor,
)
from vispress.reference.model.qwen import (
    QWEN_ID,
    VISION_END,
    VISION_START,
    build_qwen,
    encode_clips,
    encode_qwen,
    qwen_config,
)
from vispress.reference.model.qwen_data import collate_tokens, side_of
from vispress.reference.world.scenes import Scene
from vispress.reference.world.words import BOS, IMAGE, VIDEO, WORD_ID

if TYPE_CHECKING:
    from vispress.reference.model.packing import PackedBatch

# after so many decoder layers the visual tokens must know where they are, where none did before
_PLACED: Final = 2


@dataclass(frozen=True, slots=True)
class Prefix:
    """Prefix of the questions of a packed sequence: P tokens, the picture's among them.

    Args:
        ids: Token ids, P of them.
        after: Position of the first token of a question.
        positions: Where the tokens are in time, rows and columns, int64, shape (3, P); None where
            they are simply one after another.
    """

    ids: Sequence[int]
    after: int
    positions: NDArray[np.int64] | None = None


class Architecture(ABC):
    """One family of models that `train_reference` can train."""

    name: ClassVar[str]
    model_class: ClassVar[str]  # of transformers
    third: ClassVar[Literal["episodes", "clips"]]  # stage 3

    @abstractmethod
    def build(self, config: Mapping[str, int], seed: int) -> Any:
        """Build and initialise a model; `config` sets `vision_layers` and `text_layers`."""

    @abstractmethod
    def heads(self) -> DenseHeads:
        """Build heads for its dense labels."""

    @abstractmethod
    def processor(self) -> Any:
        """Build its processor."""

    @abstractmethod
    def load_processor(self, folder: Path) -> Any:
        """Load the processor saved in a folder, offline."""

    @abstractmethod
    def parts(self, model: Any) -> dict[str, nn.Module]:
        """List projector and vision side, in the order the optimiser takes them."""

    @abstractmethod
    def collate(self, scenes: Sequence[Scene], seed: int, step: int) -> DenseBatch:
        """Make the batch of a step; `seed` and `step` may choose a resolution."""

    @abstractmethod
    def look(self, model: Any, pixels: Tensor) -> Seen:
        """Encode uint8 pixels (B, S, S, 3) with the vision side."""

    @abstractmethod
    def prefix(self, side: int) -> Prefix:
        """Make the prefix of questions about a picture of `side` x `side` visual tokens."""

    @abstractmethod
    def hidden(self, model: Any, batch: "PackedBatch") -> tuple[Tensor, Seen]:
        """Compute last hidden states (B, L, D) of packed sequences, and the vision features."""

    @abstractmethod
    def for_training(self, model: Any) -> None:
        """Switch to the attention functions of packed training."""


class LlavaReference(Architecture):
    """CLIP encoder with [CLS], MLP projector, Llama."""

    name = "llava"
    model_class = "LlavaForConditionalGeneration"
    third = "episodes"

    def build(self, config: Mapping[str, int], seed: int) -> Any:
        """Build a LLaVA; see `Architecture.build`."""
        return build_model(reference_config(**config), seed=seed)

    def heads(self) -> DenseHeads:
        """Build heads for patches and [CLS]."""
        return DenseHeads(TEXT_WIDTH, VISION_WIDTH)

    def processor(self) -> Any:
        """See `build_processor`."""
        return build_processor()

    def load_processor(self, folder: Path) -> Any:
        """See `Architecture.load_processor`."""
        return load_part(LlavaProcessor, folder, "its processor", local_files_only=True)

    def parts(self, model: Any) -> dict[str, nn.Module]:
        """List the tower and the projector."""
        return {
            "vision": model.model.vision_tower,
            "projector": model.model.multi_modal_projector,
        }

    def collate(self, scenes: Sequence[Scene], seed: int, step: int) -> DenseBatch:
        """Stack pictures, which all have 96 x 96 pixels."""
        return collate(list(scenes))

    def look(self, model: Any, pixels: Tensor) -> Seen:
        """Encode pictures; features know their places from the encoder's table of positions."""
        features, cls, last = encode_image(model, normalise(pixels))
        return Seen(features, features, cls, last)

    def prefix(self, side: int) -> Prefix:
        """Put the visual tokens behind `<s>`, one after another."""
        ids = [WORD_ID[BOS], *[WORD_ID[IMAGE]] * side**2]
        return Prefix(ids, len(ids))

    def hidden(self, model: Any, batch: "PackedBatch") -> tuple[Tensor, Seen]:
        """See `Architecture.hidden`."""
        seen = self.look(model, batch.pixels)
        return embed_and_run(model, batch, seen.features).last_hidden_state, seen

    def for_training(self, model: Any) -> None:
        """Switch encoder and decoder."""
        model.model.vision_tower.set_attn_implementation(FULL)
        model.model.language_model.set_attn_implementation(PACKED)


class QwenReference(Architecture):
    """Window attention, 2 x 2 merger, M-RoPE, dynamic resolution."""

    name = "qwen2_5_vl"
    model_class = "Qwen2_5_VLForConditionalGeneration"
    third = "clips"

    def build(self, config: Mapping[str, int], seed: int) -> Any:
        """Build a LLaVA; see `Architecture.build`."""
        return build_qwen(qwen_config(**config), seed=seed)

    def heads(self) -> DenseHeads:
        """Build heads for tokens alone: there is no [CLS]."""
        return DenseHeads(TEXT_WIDTH, None, place_weight=1.0)

    def processor(self) -> Any:
        """See `build_qwen_processor`."""
        return build_qwen_processor()

    def load_processor(self, folder: Path) -> Any:
        """See `Architecture.load_processor`."""
        return load_part(PicturesProcessor, folder, "its processor", local_files_only=True)

    def parts(self, model: Any) -> dict[str, nn.Module]:
        """List merger and encoder; the merger counts as the projector."""
        return {"projector": model.model.visual.merger, "vision": model.model.visual}

    def collate(self, scenes: Sequence[Scene], seed: int, step: int) -> DenseBatch:
        """Resize all pictures of a step to one of four sizes, and stack them."""
        return collate_tokens(list(scenes), side_of(seed, step))

    def look(self, model: Any, pixels: Tensor) -> Seen:
        """Encode pictures; rotary positions are relative, so no feature knows where it is."""
        return Seen(encode_qwen(model, pixels))

    def prefix(self, side: int) -> Prefix:
        """Put the picture between its marks, at positions of time, row and column."""
        return _between_marks(IMAGE, 1, side)

    def clip_prefix(self, steps: int, side: int) -> Prefix:
        """Put a clip of `steps` temporal patches between its marks, one position of time each."""
        return _between_marks(VIDEO, steps, side)

    def hidden(self, model: Any, batch: "PackedBatch") -> tuple[Tensor, Seen]:
        """See `Architecture.hidden`; the first decoder layers find out what is where."""
        features = self.look(model, batch.pixels).features
        out = embed_and_run(model, batch, features)
        states = out.hidden_states[min(_PLACED, len(out.hidden_states) - 1)]
        return out.last_hidden_state, Seen(features, states[:, 2 : batch.prefix - 1])

    def hidden_clips(self, model: Any, batch: "PackedBatch") -> Tensor:
        """Compute the last hidden states (B, L, D) of packed sequences behind a clip each."""
        hidden: Tensor = embed_and_run(
            model, batch, encode_clips(model, batch.pixels), mark=model.config.video_token_id
        ).last_hidden_state
        return hidden

    def for_training(self, model: Any) -> None:
        """Switch the decoder; `encode_qwen` stands for the encoder."""
        model.model.language_model.set_attn_implementation(PACKED)


def _between_marks(mark: str, steps: int, side: int) -> Prefix:
    """Put a raster of steps, rows and columns between Qwen's marks, behind `<s>`."""
    n = steps * side * side
    words = [BOS, VISION_START, *[mark] * n, VISION_END]
    positions = np.zeros((3, 3 + n), dtype=np.int64)
    positions[:, 1] = 1
    positions[:, 2:-1] = 2 + np.indices((steps, side, side)).reshape(3, n)
    positions[:, -1] = 2 + side
    return Prefix([QWEN_ID[w] for w in words], 3 + side, positions)


def embed_and_run(
    model: Any, batch: "PackedBatch", features: Tensor, *, mark: int | None = None
) -> Any:
    """Run the decoder on packed sequences.

    Args:
        model: The model.
        batch: The sequences.
        features: Projected features of all pictures (I, N, D), or of clips.
        mark: Token id of their placeholders; that of pictures by default.
    """
    embeds = model.get_input_embeddings()(batch.input_ids)
    mark = model.config.image_token_id if mark is None else mark
    visual = (batch.input_ids == mark)[..., None]
    embeds = embeds.masked_scatter(visual, features.to(embeds.dtype))
    mask: Any = batch.mask(torch.get_autocast_dtype(embeds.device.type))
    mrope = batch.position_ids.ndim == 3
    return model.model.language_model(
        inputs_embeds=embeds,
        # a Qwen decoder takes a mapping as it is, and would make a causal mask of a tensor
        attention_mask={"full_attention": mask} if mrope else mask,
        position_ids=batch.position_ids,
        use_cache=False,
        output_hidden_states=mrope,
    )


ARCHITECTURES: Final[dict[str, Architecture]] = {
    each.name: each for each in (LlavaReference(), QwenReference())
}
