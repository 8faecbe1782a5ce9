"""LLaVA-1.5: one CLIP (or SigLIP) sequence an image, no geometry to undo."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import interpolate

from vispress.adapters.base import Encode, Grid, Modality, register_adapter
from vispress.adapters.padding import padded_share
from vispress.adapters.resizing import shorten_runs
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

    def encoder_grids(
        self, modality: Modality, call: Mapping[str, Any]
    ) -> Sequence[tuple[int, int]] | None:
        """The raster of pixels of any size."""
        return [self._grid(call["pixel_values"]) if call else (self._side, self._side)]

    def layouts(
        self, modality: Modality, counts: Sequence[int], call: Mapping[str, Any]
    ) -> Sequence[Layout]:
        """The raster of the encoder's patches."""
        h, w = self._grid(call["pixel_values"])
        return [((1, h, w) if h * w == count else (1, 1, count), None) for count in counts]

    @property
    def _patch(self) -> int:
        return int(self.base.config.vision_config.patch_size)

    def _grid(self, pixels: Tensor) -> tuple[int, int]:
        """Count rows and columns of patches."""
        h, w = (int(size) // self._patch for size in pixels.shape[-2:])
        return h, w

    def picture_grids(self, modality: Modality, inputs: Mapping[str, Any]) -> Sequence[Grid]:
        """Take the raster of the encoder's patches; all pictures of a batch have one size."""
        if modality == "video" or inputs.get("pixel_values") is None:
            return []
        return [(1, *self._grid(inputs["pixel_values"]))] * len(inputs["pixel_values"])

    @contextmanager
    def any_size(self) -> Iterator[None]:
        """Interpolate the encoder's position embeddings, by a hook on this instance."""

        def interpolated(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, kwargs | {"interpolate_pos_encoding": True}

        # a hook: a keyword of the model's call would reach the language model, too, and what runs
        # the model (timing, conversations) knows nothing but its inputs
        tower = self.base.vision_tower
        handle = tower.register_forward_pre_hook(interpolated, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def resize(
        self, modality: Modality, inputs: Mapping[str, Any], grids: Sequence[Grid], encode: Encode
    ) -> Mapping[str, Any]:
        """Scale down the pixels that the processor made; it makes all pictures one size."""
        if not grids:
            return inputs
        pixels, (_, rows, columns) = inputs["pixel_values"], grids[0]
        h, w = self._grid(pixels)
        size = (rows * self._patch, columns * self._patch)
        scaled = interpolate(
            pixels.float(), size, mode="bicubic", antialias=True, align_corners=False
        )
        config = self.base.config
        pad = getattr(config.get_text_config(), "pad_token_id", None) or 0
        shortened = shorten_runs(inputs, config.image_token_id, h * w, rows * columns, pad)
        return {**shortened, "pixel_values": scaled.to(pixels.dtype)}

    def square_encoder(self) -> nn.Module | None:
        """The encoder itself: `LlavaImageProcessor` pads pictures where it is told to."""
        return self.base.vision_tower  # type: ignore[no-any-return]

    def padding(self, pixels: Tensor) -> Tensor:
        """Bands around pictures that were padded to squares, found in the pixels."""
        patch, (h, w) = self._patch, self._grid(pixels)
        share = padded_share(pixels[..., : h * patch, : w * patch], patch)
        return share.flatten(1).unsqueeze(-1)
