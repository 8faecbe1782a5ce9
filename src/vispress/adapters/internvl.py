"""InternVL: tiles of one size, 2 x 2 patches shuffled into one token."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vispress.adapters.base import EncoderBlock, Modality, register_adapter
from vispress.adapters.towers import Layout, TowerAdapter
from vispress.adapters.two_layers import of_transformers, patch_norm, two_layer
from vispress.types import TwoLayer


@register_adapter("InternVLModel")
class InternVLAdapter(TowerAdapter):
    """`InternVLModel`; to it, and so here, an "image" is one tile.

    The model is given tiles (the thumbnail last when there are several) and no word on which belong
    together. Budgets are therefore per tile.
    """

    family = "internvl"
    has_cls = True

    @property
    def _tower(self) -> Any:
        return self.base.vision_tower

    def encoder_attentions(self) -> Sequence[nn.Module]:
        """InternViT's attention modules."""
        return [layer.attention for layer in self._tower.encoder.layer]

    def _known_tower(self) -> bool:
        return hasattr(getattr(self._tower, "encoder", None), "layer")

    def encoder_blocks(self) -> Sequence[EncoderBlock]:
        """InternViT's layers."""
        layers = self._tower.encoder.layer
        blocks = [EncoderBlock(x, x.attention, x.layernorm_after, x.mlp) for x in layers]
        return blocks[: self.feature_layer() + 1]

    def two_layer(self) -> TwoLayer | None:
        """The weights of the plain projector, with its norm of a token's patches together."""
        projector: Any = self.projector
        if not of_transformers(projector, ("InternVLMultiModalProjector",)):
            return None
        norm = patch_norm(projector.layer_norm, projector.linear_1)
        layers = (projector.linear_1, projector.act, projector.linear_2)
        return None if norm is None else two_layer(projector, layers, norm)

    def patches_per_token(self) -> int:
        """Those that the pixel shuffle joins."""
        return round(1 / float(self.base.config.downsample_ratio)) ** 2

    def patch_order(self, modality: Modality, call: Mapping[str, Any]) -> Tensor:
        """Order patches as the pixel shuffle joins them."""
        h, w = self._patches(call)
        raster = torch.arange(h * w).view(1, h, w, 1)
        shuffled: Tensor = self.base.pixel_shuffle(raster, self.base.config.downsample_ratio)
        return shuffled.flatten()

    def encoder_grids(
        self, modality: Modality, call: Mapping[str, Any]
    ) -> Sequence[tuple[int, int]] | None:
        """The raster of a tile's tokens."""
        if self.patches_per_token() != 4:
            return None
        vision = self.base.config.vision_config
        sides = zip(vision.image_size, vision.patch_size, strict=True)
        rows, columns = self._patches(call) if call else (size // patch for size, patch in sides)
        return [(rows // 2, columns // 2)]

    def sequences(
        self, modality: Modality, call: Mapping[str, Any], length: int
    ) -> Sequence[Sequence[int]]:
        """One a tile."""
        return [[length]] * len(call["pixel_values"])

    def pack(
        self, modality: Modality, values: Tensor, call: Mapping[str, Any]
    ) -> tuple[Tensor, ...]:
        """Mean over the patches that the pixel shuffle joins; joined rows are in order already."""
        h, w = self._patches(call)
        if values.shape[1] == h * w:
            ratio = self.base.config.downsample_ratio
            grid = values.reshape(len(values), h, w, -1)
            joined = self.base.pixel_shuffle(grid, scale_factor=ratio).flatten(1, 2)
            values = joined.unflatten(-1, (-1, values.shape[-1])).mean(-2)
        return tuple(values.unbind(0))

    def layouts(
        self, modality: Modality, counts: Sequence[int], call: Mapping[str, Any]
    ) -> Sequence[Layout]:
        """The raster of each tile."""
        ratio = self.base.config.downsample_ratio
        h, w = (int(size * ratio) for size in self._patches(call))
        return [((1, h, w) if h * w == count else (1, 1, count), None) for count in counts]

    def _patches(self, call: Mapping[str, Any]) -> tuple[int, int]:
        patch_h, patch_w = self.base.config.vision_config.patch_size
        height, width = call["pixel_values"].shape[-2:]
        return height // patch_h, width // patch_w
