"""Inputs for tiny random models (`tiny_models.build`). No hub, no processors.

A prompt is a `Sample` of `Text`, `Image` and `Video` parts; the same samples serve every family.
One unit of `h` and `w` is one patch of 4 pixels for the AnyRes families and InternVL (which cuts
images larger than 8 x 8 units into tiles), and one merged token for the Qwen families. LLaVA images
and LLaVA-OneVision videos have one size only and ignore them.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from tests.families import NEWER, TABLE, like
from tests.tiny_models import (
    FAMILIES,
    IMAGE_ID,
    MERGE,
    PAD,
    PATCH,
    QWEN,
    TEXT_IDS,
    VIDEO,
    VIDEO_ID,
    VISION_END,
    VISION_START,
    VOCAB,
    build,
)

Made = TypeVar("Made")

__all__ = [
    "FAMILIES",
    "GIST",
    "NEWER",
    "QWEN",
    "VIDEO",
    "Image",
    "Sample",
    "Text",
    "Video",
    "build",
    "cache_by_prompts",
    "features",
    "gist_tokens",
    "like",
    "make_inputs",
    "num_gist_tokens",
    "visual_positions",
]


@dataclass(frozen=True)
class Text:
    """A run of `n` random text tokens."""

    n: int


@dataclass(frozen=True)
class Image:
    """An image of `h` x `w` units (see the module's docstring)."""

    h: int = 4
    w: int = 4


@dataclass(frozen=True)
class Video:
    """A video of `t` frames (Qwen: temporal patches) of `h` x `w` units."""

    t: int = 2
    h: int = 4
    w: int = 4


Part = Text | Image | Video


@dataclass(frozen=True)
class Sample:
    """One prompt.

    Args:
        parts: Text, images and videos in order.
        bare: Leave out the Qwen vision-start and vision-end tokens, so that an image can stand at
            position 0 and at the very end (adjacent bare images are one image to Qwen: refused).
    """

    parts: Sequence[Part] = field(default_factory=lambda: [Text(5), Image(), Text(5)])
    bare: bool = False


# --- inputs

GIST = VOCAB - 1
"""The last word of the vocabulary, in no text: stands for images, to methods that want it."""
_GISTS = [0]


@contextmanager
def gist_tokens(count: int = 1) -> Iterator[None]:
    """Inside, prompts have so many tokens `GIST` behind each image and video."""
    _GISTS.append(count)
    try:
        yield
    finally:
        _GISTS.pop()


def num_gist_tokens() -> int:
    """How many prompts have behind each image now."""
    return _GISTS[-1]


def cache_by_prompts(make: Callable[..., Made]) -> Callable[..., Made]:
    """Keep what is made of arguments and of the prompts that are drawn now."""

    @functools.cache
    def kept(gists: int, *arguments: Any, **named: Any) -> Made:
        return make(*arguments, **named)

    @functools.wraps(make)
    def made(*arguments: Any, **named: Any) -> Made:
        return kept(num_gist_tokens(), *arguments, **named)

    return made


@dataclass
class _Batch:
    """What `make_inputs` collects while it walks through the samples."""

    pixels: list[Tensor] = field(default_factory=list)
    sizes: list[tuple[int, ...]] = field(default_factory=list)
    videos: list[Tensor] = field(default_factory=list)
    video_grids: list[tuple[int, int, int]] = field(default_factory=list)
    images_per_sample: list[int] = field(default_factory=list)


def make_inputs(
    family: str,
    samples: Sequence[Sample],
    *,
    padding: str | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    only: int | None = None,
) -> dict[str, Any]:
    """Arguments for `model(**inputs)` and `model.generate(**inputs)`.

    Args:
        family: One of `FAMILIES` or of `NEWER`.
        samples: The prompts.
        padding: `"left"`, `"right"`, or None when all samples have one length.
        seed: Content of sample `i` depends on `seed`, `i` and its parts only.
        dtype: Of pixel values.
        only: Build this sample alone, with the content it has in the batch (no padding).
    """
    batch, rows = _Batch(), []
    for index, sample in enumerate(samples):
        if only is None or index == only:
            generator = torch.Generator().manual_seed(1000 * seed + index)
            rows.append(_sample_ids(family, sample, batch, generator))
    width = max(map(len, rows))
    if padding is None and any(len(row) != width for row in rows):
        raise ValueError("samples of unequal length need padding='left' or 'right'")
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        start = width - len(row) if padding == "left" else 0
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = 1
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if like(family) in QWEN and (family not in TABLE or TABLE[family].typed):
        inputs["mm_token_type_ids"] = (ids == IMAGE_ID).int() + 2 * (ids == VIDEO_ID).int()
    if family in TABLE and (extra := TABLE[family].extra) is not None:
        inputs |= extra(ids)
    return inputs | _pixel_inputs(family, batch, dtype)


def _sample_ids(
    family: str, sample: Sample, batch: _Batch, generator: torch.Generator
) -> list[int]:
    """Token ids of one sample; its pixels are added to the batch."""
    alone = sum(isinstance(part, Image) for part in sample.parts) == 1
    ids: list[int] = []
    batch.images_per_sample.append(0)
    for before, part in zip([None, *sample.parts], sample.parts, strict=False):
        if isinstance(part, Text):
            ids += torch.randint(*TEXT_IDS, (part.n,), generator=generator).tolist()
            continue
        qwen = like(family) in QWEN
        if sample.bare and qwen and before is not None and not isinstance(before, Text):
            raise ValueError("adjacent bare images are one image to Qwen models")
        runs = _visual_runs(family, part, alone, batch, generator)
        wrap = qwen and not sample.bare
        for i, run in enumerate(runs):
            if i and like(family) == "qwen3_vl":  # a timestamp stands before each frame
                ids += torch.randint(*TEXT_IDS, (3,), generator=generator).tolist()
            ids += [VISION_START, *run, VISION_END] if wrap else run
        ids += [GIST] * _GISTS[-1]
    return ids


def _visual_runs(
    family: str, part: Image | Video, alone: bool, batch: _Batch, generator: torch.Generator
) -> list[list[int]]:
    """Placeholders of an image or video, one list a run; counts come from the model's own code."""
    _draw(family, part, alone, batch, generator)
    if isinstance(part, Video):
        runs = part.t if like(family) == "qwen3_vl" else 1
        return [[VIDEO_ID] * (_count(family, part, alone) // runs)] * runs
    count = _count(family, part, alone)
    if family in TABLE and (spell := TABLE[family].spell) is not None:
        return [spell(part, count)]
    return [[IMAGE_ID] * count]


def _draw(
    family: str, part: Image | Video, alone: bool, batch: _Batch, generator: torch.Generator
) -> None:
    """Add the random pixels of an image or video to the batch."""
    draw = functools.partial(torch.randn, generator=generator)
    if isinstance(part, Video):
        if not (TABLE[family].videos if family in TABLE else family in VIDEO):
            raise ValueError(f"{family} reads no videos; these do: {VIDEO}")
        t, h, w = grid = (part.t, MERGE * part.h, MERGE * part.w)
        side = _side(family)
        frames = (t * h * w, 96) if like(family) in QWEN else (t, 3, side, side)
        batch.videos.append(draw(*frames))
        batch.video_grids.append(grid)
        return
    batch.images_per_sample[-1] += 1
    if family in TABLE and (own := TABLE[family].draw) is not None:
        own(part, alone, batch, draw)
    elif like(family) in QWEN:
        batch.sizes.append((1, MERGE * part.h, MERGE * part.w))
        batch.pixels.append(draw(MERGE * part.h * MERGE * part.w, 96))
    else:
        side = _side(family)
        batch.sizes.append((PATCH * part.h, PATCH * part.w))
        batch.pixels.append(draw(_crops(family, part, alone), 3, side, side))


def _side(family: str) -> int:
    """Pixels of an edge of what the encoder takes; 0 where it takes every size."""
    size = getattr(_counter(family).config.vision_config, "image_size", 0)
    return int(size if isinstance(size, int) else size[0])


def _crops(family: str, part: Image, alone: bool) -> int:
    """Encoder sequences that an image becomes (AnyRes crops with the thumbnail; InternVL tiles)."""
    kind = like(family)
    if kind == "internvl":
        tiles = -(-part.h // 8) * -(-part.w // 8)
        return tiles + (tiles > 1)
    if kind == "llava" or (kind == "llava_onevision" and not alone):
        return 1
    anyres = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    config = _counter(family).config
    size = (PATCH * part.h, PATCH * part.w)
    pinpoints, side = config.image_grid_pinpoints, config.vision_config.image_size
    return int(anyres.image_size_to_num_patches(size, pinpoints, side))


@functools.cache
def _counter(family: str) -> Any:
    return build(family, dtype=torch.float32, layers=1)


@functools.cache
def _count(family: str, part: Image | Video, alone: bool) -> int:
    """Visual tokens of an image or video, counted by running the model's own feature code."""
    model, batch = _counter(family), _Batch(images_per_sample=[0])
    parts = [part] if alone or isinstance(part, Video) else [part, part]
    for each in parts:
        _draw(family, each, alone, batch, torch.Generator())
    modality = "video" if isinstance(part, Video) else "image"
    found = features(model, _pixel_inputs(family, batch, torch.float32), modality)
    return sum(map(len, found)) // len(parts)


def _pixel_inputs(family: str, batch: _Batch, dtype: torch.dtype) -> dict[str, Any]:
    """The keyword arguments that carry pixels, sizes and grids; empty for text alone."""
    if family in TABLE and (own := TABLE[family].pixels) is not None:
        return own(batch, dtype)
    inputs: dict[str, Any] = {}
    kind = like(family)
    if batch.pixels:
        if kind in ("llava_next", "llava_onevision"):
            most = max(map(len, batch.pixels))
            crops = [torch.cat([p, p.new_zeros(most - len(p), *p.shape[1:])]) for p in batch.pixels]
            inputs["pixel_values"] = torch.stack(crops).to(dtype)
            inputs["image_sizes"] = torch.tensor(batch.sizes)
        else:
            inputs["pixel_values"] = torch.cat(batch.pixels).to(dtype)
        if kind == "llava_onevision":
            inputs["batch_num_images"] = torch.tensor(batch.images_per_sample)
        if kind in QWEN:
            inputs["image_grid_thw"] = torch.tensor(batch.sizes)
    if batch.videos:
        join = torch.cat if kind in QWEN else torch.stack
        inputs["pixel_values_videos"] = join(batch.videos).to(dtype)
        if kind in QWEN:
            inputs["video_grid_thw"] = torch.tensor(batch.video_grids)
        seconds = {"qwen2_5_vl": "second_per_grid_ts"}.get(family)
        if name := TABLE[family].seconds if family in TABLE else seconds:
            inputs[name] = torch.full((len(batch.videos),), 0.5)
    return inputs


# --- what is where


def features(model: Any, inputs: dict[str, Any], modality: str) -> list[Tensor]:
    """The model's own features: one `[N_i, D]` an image or video (InternVL: a tile)."""
    pixels = inputs.get("pixel_values" if modality == "image" else "pixel_values_videos")
    if pixels is None:
        return []
    method = getattr(model.model, f"get_{modality}_features")
    names = inspect.signature(method).parameters
    call = {k: v for k, v in inputs.items() if k in names and not k.startswith("pixel_values")}
    with torch.no_grad():
        found = list(method(pixels, **call, return_dict=True).pooler_output)
        if apart := getattr(TABLE.get(family_of(model)), "apart", None):
            return list(apart(model, found))
        if modality == "video" and "pixel_values" in names:
            # until 5.17 the forward of LLaVA-OneVision, not this method, appends the newline
            found = [torch.cat([f, model.model.image_newline[None]]) for f in found]
    return found


def family_of(model: Any) -> str:
    """The further family that a model is of; empty for the seven."""
    name = type(model).__name__.removesuffix("ForConditionalGeneration")
    return next((each for each, one in TABLE.items() if one.model == name), "")


def visual_positions(family: str, model: Any, inputs: dict[str, Any]) -> list[list[Tensor]]:
    """Positions of the visual tokens in the padded sequence, from placeholder counts alone.

    Returns:
        For each sample, for each image or video in order of its first token, ascending `[N_i]`. An
        "image" of InternVL is one tile, as in its `get_image_features`. A Qwen3-VL video has one
        entry although text stands between its frames.
    """
    ids = inputs["input_ids"]
    queues = {
        placeholder: [len(f) for f in features(model, inputs, modality)][::-1]
        for placeholder, modality in ((IMAGE_ID, "image"), (VIDEO_ID, "video"))
    }
    found: list[list[Tensor]] = []
    for row in ids:
        items: list[Tensor] = []
        for placeholder, queue in queues.items():
            places = (row == placeholder).nonzero().flatten()
            while len(places):
                count = queue.pop()
                items.append(places[:count])
                places = places[count:]
        found.append(sorted(items, key=lambda places: int(places[0])))
    if any(queues.values()):
        raise ValueError(f"{family}: more features than placeholders")
    return found
