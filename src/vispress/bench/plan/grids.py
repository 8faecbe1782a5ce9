"""Grids of visual tokens over whole pictures, for the controls that must know them."""

from typing import Any

from vispress.adapters.base import find_adapter
from vispress.errors import UnsupportedMethodError

Grid = tuple[int, int]
Steps = tuple[int, int, int]

_QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
_KNOWN = ("llava", *_QWEN)


def check_family(name: str, model: Any) -> str:
    """The model's family, if its tokens lie on one grid over the whole picture.

    Args:
        name: The control that needs it, for the error.
        model: The model.

    Raises:
        UnsupportedMethodError: Pictures are cut into crops or tiles.
        UnsupportedModelError: No adapter knows the model.
    """
    family = find_adapter(model).family
    if family not in _KNOWN:
        raise UnsupportedMethodError(
            f"{name} needs one grid of visual tokens over the whole picture, which {family} does "
            f"not have; it works on {', '.join(_KNOWN)}"
        )
    return family


def picture_grids(model: Any, inputs: Any) -> list[Grid]:
    """Rows and columns of visual tokens of every picture of a batch, in prompt order.

    Args:
        model: Of a family that `check_family` lets through.
        inputs: A batch, as the processor gives it.
    """
    vision = model.config.vision_config
    if "image_grid_thw" in inputs:
        merge = int(vision.spatial_merge_size)
        return [(h // merge, w // merge) for _, h, w in inputs["image_grid_thw"].tolist()]
    if (pixels := inputs.get("pixel_values")) is None:
        return []
    h, w = (int(size) // int(vision.patch_size) for size in pixels.shape[-2:])
    return [(h, w)] * len(pixels)


def video_grids(model: Any, inputs: Any) -> list[Steps]:
    """Steps, rows and columns of visual tokens of every video of a batch, in prompt order.

    Args:
        model: Of a family that `is_qwen`.
        inputs: A batch, as the processor gives it.
    """
    if "video_grid_thw" not in inputs:
        return []
    merge = int(model.config.vision_config.spatial_merge_size)
    return [(t, h // merge, w // merge) for t, h, w in inputs["video_grid_thw"].tolist()]


def is_qwen(family: str) -> bool:
    """Whether pictures keep their own resolution (Qwen-VL)."""
    return family in _QWEN
