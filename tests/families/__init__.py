"""Further families of tiny models: one file each, which gives a `Family`.

What a file does not say is as with the older family that it is `like`. The laws on these are in
`tests/laws/test_newer.py`. A family for which the installed transformers is
too old is in `ABSENT`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import transformers as hf
from packaging import version


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models.

    Args:
        name: As its adapter has it.
        like: The older family whose inputs and settings it has where nothing else is said.
        model: Class of its configuration and of its model, without what both end with.
        text: Settings of the language model beside those of `like`, for a number of layers.
        vision: Settings of the vision encoder beside those of `like`.
        special: Settings beside these two.
        ids: Names of the settings of image and video placeholders.
        own: Whether `vision` is all there is of the encoder's settings, and nothing of `like`.
        videos: Whether it reads videos.
        seconds: Argument that tells seconds a step of videos, if the model asks.
        draw: Adds the pixels of an image (`part, alone, batch, draw`) to the batch.
        spell: All tokens of an image (`part, count`), placeholders and what stands among them.
        pixels: Arguments of the model (`batch, dtype`) that carry pixels.
        typed: Whether it takes `mm_token_type_ids` where `like` does.
        extra: Arguments of the model that follow from the ids `[B, L]`.
        apart: Features of a call, one tensor an image, from what the model gives.
        split: Whether a picture is several sub-pictures, each of which is an image to methods.
        windowed: Whether layers see a window, so that their caches are no longer than it.
        rounds: Whether norms or states compute in fp32 where the oracle does so in another order.
        hybrid: Whether some layers have linear attention.
        needs: Release of transformers from which on it is there.
    """

    name: str
    like: str
    model: str
    text: Callable[[int], Mapping[str, Any]] = lambda layers: {}
    vision: Mapping[str, Any] = field(default_factory=dict)
    special: Mapping[str, Any] = field(default_factory=dict)
    ids: tuple[str, ...] = ("image_token_id",)
    own: bool = False
    videos: bool = False
    seconds: str | None = None
    draw: Callable[..., None] | None = None
    spell: Callable[..., list[int]] | None = None
    pixels: Callable[..., dict[str, Any]] | None = None
    typed: bool = True
    extra: Callable[..., dict[str, Any]] | None = None
    apart: Callable[..., list[Any]] | None = None
    split: bool = False
    windowed: bool = False
    rounds: bool = False
    hybrid: bool = False
    needs: str = "5.17"


_ALL: dict[str, Family] = {
    family.name: family
    for file in sorted(iter_modules(__path__), key=lambda each: each.name)
    for family in import_module(f"{__name__}.{file.name}").FAMILIES
}
_RELEASE = version.parse(hf.__version__)
TABLE = {name: one for name, one in _ALL.items() if version.parse(one.needs) <= _RELEASE}
"""Families by name."""
NEWER: tuple[str, ...] = tuple(TABLE)
ABSENT = {name: one.needs for name, one in _ALL.items() if name not in TABLE}
"""Families that this transformers lacks, or has otherwise, and the release that they need."""


def like(family: str) -> str:
    """The older family whose inputs a family takes; an older one's is itself."""
    return TABLE[family].like if family in TABLE else family
