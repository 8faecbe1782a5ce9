"""Image down-sampling at equal token count: a smaller picture through the untouched model.

A control that needs no compression at all: what a method saves, a smaller picture saves too, in
the vision encoder as well. How a family takes smaller pictures, its adapter says (`resize`). Of a
video, every frame becomes smaller. The grid is the largest of about the picture's aspect within the
budget, so the count is at most the one asked.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from vispress.adapters.base import Encode, Grid, Modality
from vispress.bench.plan.grids import find_grids, grid_adapter
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
        """Build the budget of a picture.

        Raises:
            BudgetError: None is set.
        """
        return Budget(keep_ratio=self.keep_ratio, num_tokens=self.num_tokens)

    def grids(self, native: Sequence[Grid]) -> list[Grid]:
        """Find the smaller grid of each picture or video; all steps of a video stay.

        Args:
            native: Steps, rows and columns of visual tokens at the usual size.

        Raises:
            UnsupportedMethodError: The budget is less than one token for each step of a video.
        """
        budget, grids = self.budget(), []
        for steps, rows, columns in native:
            tokens = budget.resolve(steps * rows * columns)
            if tokens < steps:
                raise UnsupportedMethodError(
                    f"downsample keeps every frame of a video: {tokens} tokens are less than one "
                    f"for each of {steps} steps"
                )
            grids.append((steps, *small_grid(rows, columns, tokens // steps)))
        return grids


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
    """Make a batch with smaller pictures or frames, and placeholders to match.

    Args:
        method: How small.
        loaded: The model with its processor.
        inputs: The batch at the usual size.
        prompts: The same batch.

    Raises:
        UnsupportedMethodError: The family cuts pictures into crops or tiles, there are pictures
            beside videos, or a budget is less than one token for each step of a video.
        BudgetError: Other tokens came out than asked.
    """
    adapter, modality = grid_adapter(method.name, loaded.model), _modality(prompts)
    native = find_grids(method.name, adapter, modality, inputs)
    grids = method.grids(native)
    made = adapter.resize(modality, inputs, grids, _encoder(loaded, prompts, modality))
    result = list(find_grids(method.name, adapter, modality, made))
    marks = int((made["input_ids"] == adapter.placeholders()[modality]).sum())
    counts = [math.prod(grid) for grid in grids]
    if result != grids or marks != sum(counts):
        raise BudgetError(
            f"downsample is off target: {marks} visual tokens on grids {result}, asked for {grids}"
        )
    return Smaller(made, [math.prod(grid) for grid in native], counts)


@contextmanager
def any_size(model: Any) -> Iterator[None]:
    """Let the vision encoder take smaller pictures; undone at the end.

    Raises:
        UnsupportedMethodError: The family cuts pictures into crops or tiles, or its adapter cannot
            resize them.
    """
    with grid_adapter(Downsample.name, model).any_size():
        yield


def _modality(prompts: Sequence[Prompt]) -> Modality:
    """Find out what a batch shows."""
    if not any(prompt.videos for prompt in prompts):
        return "image"
    if any(prompt.images for prompt in prompts):
        raise UnsupportedMethodError("downsample takes pictures or videos, not both in one batch")
    return "video"


def _encoder(loaded: Any, prompts: Sequence[Prompt], modality: Modality) -> Encode:
    """Process a batch again with resized pictures, or videos frame by frame."""

    def encode(sizes: Sequence[tuple[int, int]], options: Mapping[str, Any]) -> Any:
        left = iter(sizes)
        if modality == "image":
            images = [[_resized(x, next(left)) for x in prompt.images] for prompt in prompts]
            return loaded.encode(prompts, images=images, **options)
        videos = [
            [_resized_video(frames, next(left)) for frames in prompt.videos] for prompt in prompts
        ]
        return loaded.encode(prompts, videos=videos, **options)

    return encode


def _resized(picture: Any, size: tuple[int, int]) -> Any:
    from PIL.Image import Resampling

    height, width = size
    return picture.resize((width, height), Resampling.BICUBIC)


def _resized_video(frames: Any, size: tuple[int, int]) -> Any:
    import numpy as np
    from PIL.Image import fromarray

    return np.stack([np.asarray(_resized(fromarray(frame), size)) for frame in frames])
