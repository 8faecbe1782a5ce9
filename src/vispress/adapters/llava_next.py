"""LLaVA-NeXT (1.6): AnyRes crops of CLIP sequences."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vispress.adapters.anyres import AnyResAdapter
from vispress.adapters.base import Modality, register_adapter


@register_adapter("LlavaNextModel")
class LlavaNextAdapter(AnyResAdapter):
    """`LlavaNextModel`: every image has a thumbnail, crops and newlines."""

    family = "llava_next"

    def encoder_grids(
        self, modality: Modality, call: Mapping[str, Any]
    ) -> Sequence[tuple[int, int]] | None:
        """The raster of a crop."""
        return [(self._side, self._side)]

    def _crops(self, call: Mapping[str, Any]) -> list[int]:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        config = self.base.config
        points, side = config.image_grid_pinpoints, config.vision_config.image_size
        return [int(image_size_to_num_patches(size, points, side)) for size in call["image_sizes"]]

    def _stitch(
        self, images: Sequence[Tensor], call: Mapping[str, Any], *, resize: bool = True
    ) -> list[Tensor]:
        packed, _ = self.base.pack_image_features(
            images,
            call["image_sizes"],
            vision_feature_select_strategy=self.base.config.vision_feature_select_strategy,
            image_newline=images[0].new_zeros(images[0].shape[-1]),
        )
        return list(packed)
