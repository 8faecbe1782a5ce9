"""Families with a `vision_tower` and a `multi_modal_projector`."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vispress.adapters.base import EncoderBlock, Modality, ModelAdapter
from vispress.adapters.two_layers import of_transformers, two_layer
from vispress.errors import UnsupportedModelError
from vispress.types import CropLayout, TwoLayer

Layout = tuple[tuple[int, int, int] | None, CropLayout | None]
"""`(grid, crops)` of one image or video; one of them is None."""


TWO_LAYER = (
    "FastVlmMultiModalProjector",
    "LlavaMultiModalProjector",
    "LlavaNextMultiModalProjector",
    "LlavaNextVideoMultiModalProjector",
    "LlavaOnevisionMultiModalProjector",
)
"""Projectors of transformers whose forward is `linear_2(act(linear_1(x)))`."""


class TowerAdapter(ModelAdapter):
    """CLIP or SigLIP sequences (one a crop), an MLP, and features in the encoder's order."""

    @property
    def has_cls(self) -> bool:  # type: ignore[override]
        """CLIP encoders have [CLS], SigLIP ones do not."""
        return hasattr(self._tower.embeddings, "class_embedding")

    @property
    def _tower(self) -> Any:
        tower = self.base.vision_tower
        return getattr(tower, "vision_model", tower)

    @property
    def _side(self) -> int:
        """Patches along one edge of a crop."""
        vision = self.base.config.vision_config
        return int(vision.image_size) // int(vision.patch_size)

    def placeholders(self) -> Mapping[Modality, int]:
        """The image token id."""
        return {"image": self.base.config.image_token_id}

    def encoder_attentions(self) -> Sequence[nn.Module]:
        """The encoder's attention modules."""
        return [layer.self_attn for layer in self._tower.encoder.layers]

    def feature_layer(self) -> int:
        """`hidden_states[i]` is the output of layer `i - 1` (index 0 is the embedding)."""
        layer = int(self.base.config.vision_feature_layer)
        return layer - 1 if layer >= 0 else len(self.encoder_attentions()) + layer

    def feature_choice(self, call: Mapping[str, Any]) -> Mapping[str, Any]:
        """Give the encoder layer (0 is the embedding), and what of its output is chosen."""
        names = ("vision_feature_layer", "vision_feature_select_strategy")
        given = {name: call.get(name) for name in names}
        chosen = {
            name: getattr(self.base.config, name, None) if value is None else value
            for name, value in given.items()
        }
        layer = chosen[names[0]]
        if isinstance(layer, int) and layer < 0:
            chosen[names[0]] = layer + len(self.encoder_attentions()) + 1
        return chosen

    def encoder_blocks(self) -> Sequence[EncoderBlock]:
        """CLIP's and SigLIP's layers."""
        layers = self._tower.encoder.layers
        if not all(hasattr(layer, "layer_norm2") and hasattr(layer, "mlp") for layer in layers):
            return ()
        blocks = [EncoderBlock(x, x.self_attn, x.layer_norm2, x.mlp) for x in layers]
        return blocks[: self.feature_layer() + 1]

    def merged_images(
        self, modality: Modality, call: Mapping[str, Any], runs: Sequence[int], *, geometry: bool
    ) -> tuple[Sequence[int], Mapping[str, Any]]:
        """Count images of the encoder's own size; they may stand side by side."""
        vision = self.base.config.vision_config
        side, patch = (
            (size, size) if isinstance(size, int) else tuple(size)
            for size in (vision.image_size, vision.patch_size)
        )
        patches = (side[0] // patch[0]) * (side[1] // patch[1])
        counts, tokens = [], patches // self.patches_per_token()
        for run in runs:
            if run % tokens:
                raise UnsupportedModelError(
                    f"a run of {run} image placeholders beside inputs_embeds is no number of "
                    f"images of {tokens} tokens, which {self.family} makes of {side[0]} x "
                    f"{side[1]} pixels; pass pixel values"
                )
            counts += [tokens] * (run // tokens)
        return counts, {"pixel_values": torch.empty(len(counts), 3, *side, device="meta")}

    @property
    def projector(self) -> nn.Module:
        """The MLP."""
        return self.base.multi_modal_projector  # type: ignore[no-any-return]

    def two_layer(self) -> TwoLayer | None:
        """The weights of a plain LLaVA projector with GELU."""
        projector: Any = self.projector
        if not of_transformers(projector, TWO_LAYER):
            return None
        return two_layer(projector, (projector.linear_1, projector.act, projector.linear_2))

    def projector_inputs(self, modality: Modality, raw: Tensor, call: Mapping[str, Any]) -> Tensor:
        """Already `[P, n, Dv]`, without [CLS]."""
        return raw

    def check(self) -> None:
        """Known towers, one feature layer, and [CLS] left out where there is one."""
        config, name = self.base.config, type(self.base).__name__
        if not self._known_tower():
            raise UnsupportedModelError(
                f"{name} with a {type(self._tower).__name__}: CLIP and SigLIP towers are supported"
            )
        layer = config.vision_feature_layer
        if not isinstance(layer, int):
            raise UnsupportedModelError(
                f"vision_feature_layer={layer!r} mixes encoder layers; one integer is supported"
            )
        count = len(self.encoder_attentions())
        if not 0 <= self.feature_layer() < count:
            raise UnsupportedModelError(
                f"vision_feature_layer={layer} is no encoder layer's output; valid are -{count} "
                f"to -1 and 1 to {count}"
            )
        wanted = "default" if self.has_cls else "full"
        if config.vision_feature_select_strategy != wanted:
            raise UnsupportedModelError(
                f"vision_feature_select_strategy={config.vision_feature_select_strategy!r}: an "
                f"encoder {'with' if self.has_cls else 'without'} [CLS] needs {wanted!r}"
            )

    def _known_tower(self) -> bool:
        layers: Any = getattr(getattr(self._tower, "encoder", None), "layers", ())
        return (
            hasattr(self._tower, "embeddings")
            and len(layers) > 0
            and hasattr(layers[0], "self_attn")
        )


def video_pixels(call: Mapping[str, Any]) -> Tensor:
    """`[videos, frames, 3, H, W]`; the argument was called `pixel_values` until 5.17."""
    pixels = call.get("pixel_values_videos")
    return call["pixel_values"] if pixels is None else pixels  # type: ignore[no-any-return]
