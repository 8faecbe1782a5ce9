"""LLaVA-NeXT-Video: AnyRes images as LLaVA-NeXT, and videos of pooled frames."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import avg_pool2d

from vispress.adapters.base import Modality, register_adapter
from vispress.adapters.llava_next import LlavaNextAdapter
from vispress.adapters.towers import Layout, video_pixels


@register_adapter("LlavaNextVideoModel")
class LlavaNextVideoAdapter(LlavaNextAdapter):
    """`LlavaNextVideoModel`: frames are pooled ahead of the projector, and follow each other.

    Values of the encoder's patches are averaged over those that become a token, whatever the
    model pools features by.
    """

    family = "llava_next_video"
    transformers = "5.24"
    kinds = frozenset({"anyres", "video"})

    @property
    def _stride(self) -> int:
        """Patches along one edge of a video's token."""
        return int(self.base.config.spatial_pool_stride)

    def placeholders(self) -> Mapping[Modality, int]:
        """Image and video token ids."""
        config = self.base.config
        return {"image": config.image_token_id, "video": config.video_token_id}

    def encoder_grids(
        self, modality: Modality, call: Mapping[str, Any]
    ) -> Sequence[tuple[int, int]] | None:
        """None: frames are pooled once more behind the encoder."""
        return None

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
        """Images as AnyRes; frames are pooled where they are not yet, and joined."""
        if modality == "image":
            return super().pack(modality, values, call)
        if values.shape[1] == self._side**2:
            raster = values.transpose(1, 2).reshape(len(values), -1, self._side, self._side)
            values = avg_pool2d(raster, self._stride).flatten(2).transpose(1, 2)
        videos = video_pixels(call).shape[0]
        return tuple(values.reshape(videos, -1, values.shape[-1]))

    def layouts(
        self, modality: Modality, counts: Sequence[int], call: Mapping[str, Any]
    ) -> Sequence[Layout]:
        """Crops of images; the raster of a video's frames."""
        if modality == "image":
            return super().layouts(modality, counts, call)
        frames, side = video_pixels(call).shape[1], self._side // self._stride
        whole = (frames, side, side)
        return [(whole if frames * side**2 == n else (1, 1, n), None) for n in counts]
