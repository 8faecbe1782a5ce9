"""LLaVA-OneVision: AnyRes for a single image, one crop each for several, pooled video frames."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vispress.adapters.anyres import AnyResAdapter
from vispress.adapters.base import Modality, raster, register_adapter
from vispress.adapters.towers import Layout, video_pixels
from vispress.errors import UnsupportedModelError
from vispress.types import CropLayout

_UNLIMITED = "anyres_max_1000000"


@register_adapter("LlavaOnevisionModel")
class LlavaOnevisionAdapter(AnyResAdapter):
    """`LlavaOnevisionModel`: images as AnyRes, videos as pooled frames with one newline at the end.

    The model pools video frames behind the projector; the projector's inputs of a pooled token are
    approximated by pooling them in the same way.
    """

    family = "llava_onevision"
    kinds = frozenset({"anyres", "video"})

    def placeholders(self) -> Mapping[Modality, int]:
        """Image and video token ids."""
        config = self.base.config
        return {"image": config.image_token_id, "video": config.video_token_id}

    def features(self, modality: Modality, output: Any) -> tuple[Tensor, ...]:
        """Until transformers 5.17, the forward appends the newline to a video's features."""
        features = super().features(modality, output)
        names = inspect.signature(self.base.get_video_features).parameters
        if modality == "image" or "pixel_values_videos" in names:
            return features
        return tuple(torch.cat([f, self.base.image_newline[None].to(f)]) for f in features)

    def _crops(self, call: Mapping[str, Any]) -> list[int]:
        from transformers.models.llava_onevision.modeling_llava_onevision import (
            image_size_to_num_patches,
        )

        config, sizes = self.base.config, call["image_sizes"]
        points, side = config.image_grid_pinpoints, config.vision_config.image_size
        # images of a sample with several are not cut, as in the model
        per_sample = call.get("batch_num_images")
        if per_sample is None:
            alone = [True] * len(sizes)
        else:
            alone = [int(n) == 1 for n in per_sample for _ in range(int(n))]
        return [
            int(image_size_to_num_patches(size, points, side)) if cut else 1
            for size, cut in zip(sizes, alone, strict=True)
        ]

    def _stitch(
        self, images: Sequence[Tensor], call: Mapping[str, Any], *, resize: bool = True
    ) -> list[Tensor]:
        limit = call.get("vision_aspect_ratio") or self.base.config.vision_aspect_ratio
        packed, _ = self.base.pack_image_features(
            images,
            call["image_sizes"],
            image_newline=images[0].new_zeros(images[0].shape[-1]),
            vision_aspect_ratio=limit if resize else _UNLIMITED,
        )
        return list(packed)

    def sequences(
        self, modality: Modality, call: Mapping[str, Any], length: int
    ) -> Sequence[Sequence[int]]:
        """One a crop or frame."""
        if modality == "image":
            return super().sequences(modality, call, length)
        videos, frames = video_pixels(call).shape[:2]
        return [[length] * frames] * videos

    def pack(
        self, modality: Modality, values: Tensor, call: Mapping[str, Any]
    ) -> tuple[Tensor, ...]:
        """Images as AnyRes; frames are pooled, joined and closed by a newline (zeros)."""
        if modality == "image":
            return super().pack(modality, values, call)
        videos = video_pixels(call).shape[0]
        pooled = self.base.apply_pooling(values)
        joined = pooled.reshape(videos, -1, pooled.shape[-1])
        return tuple(torch.cat([video, video.new_zeros(1, video.shape[-1])]) for video in joined)

    def layouts(
        self, modality: Modality, counts: Sequence[int], call: Mapping[str, Any]
    ) -> Sequence[Layout]:
        """Crops of images; frames of videos are segments."""
        if modality == "image":
            return super().layouts(modality, counts, call)
        frames, side = video_pixels(call).shape[1], -(-self._side // 2)
        row, col = raster(side, side)
        end = torch.tensor([-1])
        layout = CropLayout(
            segment=torch.cat([torch.arange(frames).repeat_interleave(side * side), end]),
            row=torch.cat([row.repeat(frames), end]),
            col=torch.cat([col.repeat(frames), end]),
        )
        for count in counts:
            if count != len(layout.segment):
                raise UnsupportedModelError(
                    f"a video of {count} visual tokens should have {len(layout.segment)}: "
                    f"{frames} frames of {side} x {side} and a newline"
                )
        return [(None, layout) for _ in counts]
