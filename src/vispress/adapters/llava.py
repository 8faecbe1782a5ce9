"""LLaVA-1.5: one CLIP (or SigLIP) sequence an image, no geometry to undo."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vispress.adapters.base import Modality, register_adapter
from vispress.adapters.padding import padded_share
from vispress.adapters.towers import Layout, TowerAdapter


@register_adapter("LlavaModel")
class LlavaAdapter(TowerAdapter):
    """`LlavaModel`: visual tokens are the encoder's patches, in raster order."""

    family = "llava"

    def pack(
        self, modality: Modality, values: Tensor, call: Mapping[str, Any]
    ) -> tuple[Tensor, ...]:
        """One encoder sequence is one image."""
        return tuple(values.unbind(0))

    def sequences(
        self, modality: Modality, call: Mapping[str, Any], length: int
    ) -> Sequence[Sequence[int]]:
        """One an image."""
        return [[length]] * len(call["pixel_values"])

    def layouts(
        self, modality: Modality, counts: Sequence[int], call: Mapping[str, Any]
    ) -> Sequence[Layout]:
        """The raster of the encoder's patches."""
        patch = int(self.base.config.vision_config.patch_size)
        h, w = (int(size) // patch for size in call["pixel_values"].shape[-2:])
        return [((1, h, w) if h * w == count else (1, 1, count), None) for count in counts]

    def square_encoder(self) -> nn.Module | None:
        """The encoder itself: `LlavaImageProcessor` pads pictures where it is told to."""
        return self.base.vision_tower  # type: ignore[no-any-return]

    def padding(self, pixels: Tensor) -> Tensor:
        """Bands around pictures that were padded to squares, found in the pixels."""
        patch = int(self.base.config.vision_config.patch_size)
        h, w = (int(size) // patch for size in pixels.shape[-2:])
        share = padded_share(pixels[..., : h * patch, : w * patch], patch)
        return share.flatten(1).unsqueeze(-1)
