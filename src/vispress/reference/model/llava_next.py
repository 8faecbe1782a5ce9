"""The AnyRes reference: a LLaVA-NeXT grown from the LLaVA reference, and stored as what changed.

A crop is one more view of 96 x 96 pixels, so vision encoder, projector and words are the parent's.
The decoder is stored as its difference from the parent's, in eight bits with a scale for each row,
in `delta.safetensors`; the parent's file is read for the rest.
"""

from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
)
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from vispress.model_folders import load_part
from vispress.reference.model.llava import normalise
from vispress.reference.model.processor import build_tokenizer
from vispress.reference.world.large import FIELDS, Fields
from vispress.reference.world.scenes import GRID, IMAGE_SIZE, NUM_PATCHES, PATCH_SIZE
from vispress.reference.world.words import IMAGE

PINPOINTS: Final = [[IMAGE_SIZE * r, IMAGE_SIZE * c] for r, c in ((1, 1), *FIELDS)]
_POSITIONS: Final = 1024  # of four crops and a question, there are some 780


def graft(parent: LlavaForConditionalGeneration) -> LlavaNextForConditionalGeneration:
    """Put the weights of a LLaVA reference into a LLaVA-NeXT.

    Args:
        parent: The LLaVA; not changed.

    Returns:
        The model in eval mode, fp32; its newline is the mean of the word embeddings.
    """
    settings = parent.config.to_dict()
    text = {**settings["text_config"], "max_position_embeddings": _POSITIONS}
    config = LlavaNextConfig(
        vision_config=settings["vision_config"],
        text_config=text,
        image_token_id=parent.config.image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=NUM_PATCHES,
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=True,
        pad_token_id=parent.config.pad_token_id,
        bos_token_id=parent.config.bos_token_id,
        eos_token_id=parent.config.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        model = LlavaNextForConditionalGeneration(config)
    weights = dict(parent.float().state_dict())
    words = parent.get_input_embeddings().weight.detach()
    weights["model.image_newline"] = words.float().mean(0)
    model.load_state_dict(weights)
    model.generation_config = parent.generation_config
    model.set_attn_implementation("sdpa")
    return model.eval()


def build_anyres_processor() -> LlavaNextProcessor:
    """Build a `LlavaNextProcessor` whose image side needs Pillow only (no torchvision)."""
    images = LlavaNextImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        image_grid_pinpoints=PINPOINTS,
    )
    return LlavaNextProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


def visual_tokens(fields: Fields) -> int:
    """Count the visual tokens of a picture: thumbnail, crops, and a newline behind each row."""
    return NUM_PATCHES + GRID * fields[0] * (GRID * fields[1] + 1)


def see_crops(model: Any, pixels: Tensor, fields: Fields) -> Tensor:
    """Compute visual tokens (I, N, D) of pictures as `LlavaNextModel` does.

    Args:
        model: The model; no gradient reaches its encoder.
        pixels: Of `cut`, uint8, shape (I, 1 + C, 96, 96, 3).
        fields: Rows and columns of crops, C = rows * columns.
    """
    rows, columns = fields
    tower = model.model.vision_tower
    with torch.no_grad():
        hidden = tower.pre_layrnorm(tower.embeddings(normalise(pixels.flatten(0, 1))))
        for layer in tower.encoder.layers[:-1]:
            hidden = layer(hidden, None)
    seen = model.model.multi_modal_projector(hidden[:, 1:])
    seen = torch.unflatten(seen, 0, (len(pixels), -1))
    crops = torch.unflatten(torch.unflatten(seen[:, 1:], 1, (rows, columns)), 3, (GRID, GRID))
    raster = crops.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # [I, 12 * rows, 12 * columns, D]
    newline = model.model.image_newline.to(raster.dtype).expand(*raster.shape[:2], 1, -1)
    return torch.cat([seen[:, 0], torch.cat([raster, newline], dim=2).flatten(1, 2)], dim=1)


DELTA: Final = "delta.safetensors"
_SCALE: Final = ".scale"
_NEWLINE: Final = "model.image_newline"


def export_delta(model: Any, parent: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write what distinguishes a model from its parent, with configuration and processor.

    Args:
        model: Of `graft`, trained; words, projector and encoder must be the parent's still.
        parent: The LLaVA that it was grown from, fp32.
        folder: What `read_delta` takes; made if it is not there.

    Raises:
        ValueError: Something changed that is not stored.
    """
    stored: dict[str, Tensor] = {}
    before = parent.state_dict()
    for name, after in model.state_dict().items():
        if name == _NEWLINE:
            stored[name] = after.detach().half().clone()
            continue
        delta = (after - before[name]).detach().float()
        if not delta.any():
            continue
        if not name.startswith("model.language_model.") or "embed_tokens" in name:
            raise ValueError(f"{name} is the parent's, and changed")
        scale = delta.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
        stored[name] = (delta / scale).round().to(torch.int8)
        stored[name + _SCALE] = scale
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / DELTA)
    model.config.save_pretrained(folder)
    build_anyres_processor().save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)


def read_delta(
    folder: Path, parent: LlavaForConditionalGeneration, dtype: torch.dtype
) -> tuple[Any, LlavaNextProcessor]:
    """Load a folder that `export_delta` wrote, offline.

    Args:
        folder: The folder.
        parent: The LLaVA that it was grown from, fp32.
        dtype: Type of the weights.

    Returns:
        The model in eval mode on the CPU, and its processor.

    Raises:
        CheckpointError: The processor's files are missing or damaged.
        ValueError: The delta cannot be read, or is of another parent.
    """
    model = graft(parent)
    try:
        stored = load_file(folder / DELTA)
    except SafetensorError as error:
        raise ValueError(f"{DELTA}: {error}") from error
    weights = model.state_dict()
    for name, value in stored.items():
        if name == _NEWLINE:
            weights[name].copy_(value)
        elif not name.endswith(_SCALE):
            if name not in weights or weights[name].shape != value.shape:
                raise ValueError(f"{DELTA} has {name}, {tuple(value.shape)}: no such weight")
            weights[name] += value.float() * stored[name + _SCALE]
    processor = load_part(LlavaNextProcessor, folder, "its processor", local_files_only=True)
    return model.to(dtype).eval(), processor
