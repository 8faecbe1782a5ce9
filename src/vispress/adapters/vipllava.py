"""VipLLaVA: one CLIP sequence an image, of which several layers are read side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from vispress.adapters.base import EncoderBlock, Modality, register_adapter
from vispress.adapters.llava import LlavaAdapter
from vispress.adapters.two_layers import of_transformers, patch_norm, two_layer
from vispress.errors import UnsupportedModelError
from vispress.types import TwoLayer


@register_adapter("VipLlavaModel")
class VipLlavaAdapter(LlavaAdapter):
    """`VipLlavaModel`: LLaVA whose projector takes the outputs of several encoder layers.

    What methods read of the encoder's attention is the deepest of these layers'.
    """

    family = "vipllava"
    transformers = "5.24"

    @property
    def _read_layers(self) -> list[int]:
        """Layers whose outputs are read (`hidden_states[i]` is the output of layer `i - 1`)."""
        named = self.base.config.vision_feature_layer
        count = len(self.encoder_attentions())
        layers = [named] if isinstance(named, int) else list(named)
        return [layer - 1 if layer >= 0 else count + layer for layer in layers]

    def feature_layer(self) -> int:
        """The deepest of those that are read."""
        return max(self._read_layers)

    def encoder_blocks(self) -> Sequence[EncoderBlock]:
        """CLIP's layers where one is read: tokens that merge between two fit neither."""
        return super().encoder_blocks() if len(self._read_layers) == 1 else ()

    def encoder_grids(
        self, modality: Modality, call: Mapping[str, Any]
    ) -> Sequence[tuple[int, int]] | None:
        """The raster where one layer is read: of several, their grids would differ."""
        return super().encoder_grids(modality, call) if len(self._read_layers) == 1 else None

    def two_layer(self) -> TwoLayer | None:
        """The weights of a plain projector, with its norm of all layers' outputs together."""
        projector: Any = self.projector
        if not of_transformers(projector, ("VipLlavaMultiModalProjector",)):
            return None
        norm = patch_norm(projector.projector_layernorm, projector.linear_1)
        layers = (projector.linear_1, projector.act, projector.linear_2)
        return None if norm is None else two_layer(projector, layers, norm)

    def check(self) -> None:
        """A CLIP tower, since the model leaves out the first token, and layers that it has."""
        if not self._known_tower() or not self.has_cls:
            raise UnsupportedModelError(
                f"VipLlavaModel with a {type(self._tower).__name__}: the model leaves out the "
                "encoder's first token; CLIP towers, which have [CLS] there, are supported"
            )
        count = len(self.encoder_attentions())
        if not all(0 <= layer < count for layer in self._read_layers):
            raise UnsupportedModelError(
                f"vision_feature_layer={self.base.config.vision_feature_layer!r} names no encoder "
                f"layer's output; valid are -{count} to -1 and 1 to {count}"
            )
