"""Image down-sampling at equal token count: a smaller picture through the untouched model.

A control that needs no compression at all: what a method saves, a smaller picture saves too, in
the vision encoder as well. LLaVA's encoder interpolates its position embeddings to the smaller
grid; Qwen-VL takes pictures of any resolution. Of a video, every frame becomes smaller. The grid is
the largest of about the picture's aspect within the budget, so the count is at most the one asked.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

from torch.nn.functional import interpolate

from vispress.bench.plan.grids import (
    Grid,
    Steps,
    check_family,
    is_qwen,
    picture_grids,
    video_grids,
)
from vispress.bench.tasks.task import Prompt
from vispress.budget import Budget
from vispress.errors import BudgetError, UnsupportedMethodError
from vispress.methods._parts.geometry.grids import small_grid


@dataclass(frozen=True, kw_only=True)
class Downsample:
    """Smaller pictures in place of fewer tokens.

    Args:
        keep_ratio: Fraction of visual tokens, in `(0, 1]`; the same in every decoder layer.
        num_tokens: Visual tokens of a picture, in place of it.

    Raises:
        BudgetError: Both are given, or one is out of range.
    """

    name: ClassVar[str] = "downsample"
    takes_budget: ClassVar[bool] = True

    keep_ratio: float | None = None
    num_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.num_tokens == 0:
            raise BudgetError("num_tokens must be at least 1, got 0")
        if self.keep_ratio is not None or self.num_tokens is not None:
            self.budget()

    def budget(self) -> Budget:
        """What a picture may keep.

        Raises:
            BudgetError: None is set.
        """
        return Budget(keep_ratio=self.keep_ratio, num_tokens=self.num_tokens)

    def grids(self, native: Sequence[Grid]) -> list[Grid]:
        """The smaller grid of each picture.

        Args:
            native: Rows and columns of visual tokens at the usual size.
        """
        budget = self.budget()
        return [small_grid(h, w, budget.resolve(h * w)) for h, w in native]


@dataclass(frozen=True)
class Smaller:
    """A batch of smaller pictures.

    Args:
        inputs: For the model.
        native: Tokens of each picture at the usual size.
        kept: Tokens of each picture now.
    """

    inputs: Any
    native: list[int]
    kept: list[int]


def smaller(method: Downsample, loaded: Any, inputs: Any, prompts: Sequence[Prompt]) -> Smaller:
    """The batch with smaller pictures, and placeholders to match.

    Args:
        method: How small.
        loaded: The model with its processor.
        inputs: The batch at the usual size.
        prompts: The same batch.

    Raises:
        UnsupportedMethodError: The family cuts pictures into crops or tiles.
        BudgetError: The processor made more tokens than asked.
    """
    family = check_family(method.name, loaded.model)
    if videos := video_grids(loaded.model, inputs):
        return _smaller_clips(method, loaded, prompts, videos)
    native = picture_grids(loaded.model, inputs)
    grids = method.grids(native)
    make = _resized_qwen if is_qwen(family) else _resized_llava
    made = make(loaded, inputs, prompts, grids)
    found = picture_grids(loaded.model, made)
    marks = int((made["input_ids"] == loaded.model.config.image_token_id).sum())
    if found != grids or marks != sum(h * w for h, w in grids):
        raise _off_target(marks, found, grids)
    return Smaller(made, [h * w for h, w in native], [h * w for h, w in grids])


def _off_target(marks: int, found: Any, asked: Any) -> BudgetError:
    return BudgetError(
        f"downsample is off target: {marks} visual tokens on grids {found}, asked for {asked}"
    )


def _smaller_clips(
    method: Downsample, loaded: Any, prompts: Sequence[Prompt], native: Sequence[Steps]
) -> Smaller:
    """The batch with smaller frames; all of them stay, each with its share of the budget.

    Raises:
        UnsupportedMethodError: There are pictures beside videos, or the budget is less than one
            token for each step.
        BudgetError: The processor made more tokens than asked.
    """
    if any(prompt.images for prompt in prompts):
        raise UnsupportedMethodError("downsample takes pictures or videos, not both in one batch")
    budgets = [method.budget().resolve(t * h * w) for t, h, w in native]
    small: list[Grid] = []
    for (t, h, w), budget in zip(native, budgets, strict=True):
        if budget < t:
            raise UnsupportedMethodError(
                f"downsample keeps every frame of a video: {budget} tokens are less than one for "
                f"each of {t} steps"
            )
        small.append(small_grid(h, w, budget // t))
    made = _resized_clips(loaded, prompts, small)
    asked = [(t, *grid) for (t, _, _), grid in zip(native, small, strict=True)]
    found = video_grids(loaded.model, made)
    marks = int((made["input_ids"] == loaded.model.config.video_token_id).sum())
    counts = [t * h * w for t, h, w in asked]
    if found != asked or marks != sum(counts):
        raise _off_target(marks, found, asked)
    return Smaller(made, [t * h * w for t, h, w in native], counts)


@contextmanager
def any_size(model: Any) -> Iterator[None]:
    """Let the vision encoder take smaller pictures, by a hook on this instance; undone at the end.

    Raises:
        UnsupportedMethodError: The family cuts pictures into crops or tiles.
    """
    if is_qwen(check_family(Downsample.name, model)):
        yield
        return

    def interpolated(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"interpolate_pos_encoding": True}

    tower = model.model.vision_tower
    handle = tower.register_forward_pre_hook(interpolated, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _resized_llava(
    loaded: Any, inputs: Any, prompts: Sequence[Prompt], grids: Sequence[Grid]
) -> Any:
    """Pixels as the processor made them, scaled down; every run of placeholders is shortened."""
    if not grids:
        return inputs
    patch = int(loaded.model.config.vision_config.patch_size)
    (rows, columns), old = grids[0], picture_grids(loaded.model, inputs)[0]
    size = (rows * patch, columns * patch)
    pixels = inputs["pixel_values"]
    scaled = interpolate(pixels.float(), size, mode="bicubic", antialias=True, align_corners=False)
    mark = loaded.model.config.image_token_id
    texts = []
    for ids, seen in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
        own = ids[seen]
        # the n-th placeholder of a picture stays if it is one of its first rows * columns
        place = ((own == mark).cumsum(0) - 1) % (old[0] * old[1])
        texts.append(own[(own != mark) | (place < rows * columns)])
    padded = loaded.processor.tokenizer.pad(
        {"input_ids": texts}, padding_side="left", return_tensors="pt"
    ).to(inputs["input_ids"].device)
    return {**padded, "pixel_values": scaled.to(pixels.dtype)}


def _resized_qwen(
    loaded: Any, inputs: Any, prompts: Sequence[Prompt], grids: Sequence[Grid]
) -> Any:
    """Pictures resized to whole tokens, which the processor then leaves as they are."""
    from PIL.Image import Resampling

    vision = loaded.model.config.vision_config
    side = int(vision.patch_size) * int(vision.spatial_merge_size)
    pictures = iter(grids)
    resized = []
    for prompt in prompts:
        sizes = [(columns * side, rows * side) for rows, columns in _take(pictures, prompt)]
        images = zip(prompt.images, sizes, strict=True)
        resized.append(tuple(image.resize(size, Resampling.BICUBIC) for image, size in images))
    pixels = [rows * columns * side**2 for rows, columns in grids]
    bounds = {"shortest_edge": min(pixels, default=1), "longest_edge": max(pixels, default=1)}
    return loaded.encode(prompts, images=resized, images_kwargs={"size": bounds})


def _resized_clips(loaded: Any, prompts: Sequence[Prompt], grids: Sequence[Grid]) -> Any:
    """Frames resized to whole tokens, which the processor then leaves as they are."""
    import numpy as np
    from PIL.Image import Resampling, fromarray

    vision = loaded.model.config.vision_config
    side = int(vision.patch_size) * int(vision.spatial_merge_size)
    left = iter(grids)
    resized: list[list[Any]] = []
    for prompt in prompts:
        sizes = [(columns * side, rows * side) for rows, columns in islice(left, prompt.visuals)]
        own = []
        for frames, size in zip(prompt.videos, sizes, strict=True):
            small = (fromarray(frame).resize(size, Resampling.BICUBIC) for frame in frames)
            own.append(np.stack([np.asarray(frame) for frame in small]))
        resized.append(own)
    pixels = [rows * columns * side**2 for rows, columns in grids]
    bounds = {"shortest_edge": min(pixels), "longest_edge": max(pixels)}
    return loaded.encode(prompts, videos=resized, videos_kwargs={"size": bounds})


def _take(pictures: Iterator[Grid], prompt: Prompt) -> list[Grid]:
    return [next(pictures) for _ in prompt.images]
