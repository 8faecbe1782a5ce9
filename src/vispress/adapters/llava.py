"""LLaVA-1.5: one CLIP (or SigLIP) sequence an image, a projector, no geometry to undo."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vispress.adapters.base import Modality, ModelAdapter, register_adapter
from vispress.errors import UnsupportedModelError
from vispress.types import CropLayout


@register_adapter("LlavaModel")
class LlavaAdapter(ModelAdapter):
    """`LlavaModel`: visual tokens are the encoder's patches, in raster order."""

    family = "llava"

    @property
    def has_cls(self) -> bool:  # type: ignore[override]
        """CLIP encoders have [CLS], SigLIP ones do not."""
        return hasattr(self._encoder.embeddings, "class_embedding")

    @property
    def _encoder(self) -> Any:
        tower = self.base.vision_tower
        return getattr(tower, "vision_model", tower)

    def placeholders(self) -> Mapping[Modality, int]:
        """The image token id."""
        return {"image": self.base.config.image_token_id}

    def encoder_attentions(self) -> Sequence[nn.Module]:
        """CLIP's attention modules."""
        return [layer.self_attn for layer in self._encoder.encoder.layers]

    def feature_layer(self) -> int:
        """`hidden_states[i]` is the output of layer `i - 1` (index 0 is the embedding)."""
        layer = self.base.config.vision_feature_layer
        count = len(self._encoder.encoder.layers)
        return layer - 1 if layer >= 0 else count + layer

    @property
    def projector(self) -> nn.Module:
        """The two-layer MLP."""
        return self.base.multi_modal_projector  # type: ignore[no-any-return]

    def projector_inputs(self, modality: Modality, raw: Tensor, call: Mapping[str, Any]) -> Tensor:
        """Already `[P, n, Dv]`."""
        return raw

    def pack(
        self, modality: Modality, values: Tensor, call: Mapping[str, Any]
    ) -> tuple[Tensor, ...]:
        """One encoder sequence is one image."""
        return tuple(values.unbind(0))

    def layouts(
        self, modality: Modality, counts: Sequence[int], call: Mapping[str, Any]
    ) -> Sequence[tuple[tuple[int, int, int] | None, CropLayout | None]]:
        """A square raster."""
        layouts: list[tuple[tuple[int, int, int] | None, CropLayout | None]] = []
        for count in counts:
            side = round(count**0.5)
            layouts.append(((1, side, side) if side * side == count else (1, 1, count), None))
        return layouts

    def check(self) -> None:
        """One feature layer only."""
        layer = self.base.config.vision_feature_layer
        if not isinstance(layer, int):
            raise UnsupportedModelError(
                f"vision_feature_layer={layer!r} mixes several encoder layers; one integer is supported"
            )
