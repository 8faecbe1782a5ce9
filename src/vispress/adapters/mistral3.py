"""Mistral 3: a Pixtral encoder for pictures of any size, 2 x 2 merging, rows of placeholders."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vispress.adapters.base import Modality, ModelAdapter, register_adapter
from vispress.adapters.towers import Layout
from vispress.errors import UnsupportedModelError


@register_adapter("Mistral3Model")
class Mistral3Adapter(ModelAdapter):
    """`Mistral3Model`: all pictures of a call are one packed sequence of patches.

    Placeholders of a picture stand row by row, with [IMG_BREAK] between, which is text. Token
    inputs of the projector are `[N, merge**2 * Dv]`: the patches of each token, ahead of its norm.
    """

    family = "mistral3"
    packed = True

    @property
    def _merge(self) -> int:
        """Patches along one edge of a token."""
        return int(self.base.config.spatial_merge_size)

    @property
    def _layers(self) -> Any:
        return self.base.vision_tower.transformer.layers

    def placeholders(self) -> Mapping[Modality, int]:
        """The image token id."""
        return {"image": self.base.config.image_token_id}

    def encoder_attentions(self) -> Sequence[nn.Module]:
        """Pixtral's attention modules."""
        return [layer.attention for layer in self._layers]

    def feature_layer(self) -> int:
        """`hidden_states[i]` is the output of layer `i - 1` (index 0 is the embedding)."""
        layer = int(self.base.config.vision_feature_layer)
        return layer - 1 if layer >= 0 else len(self._layers) + layer

    def feature_choice(self, call: Mapping[str, Any]) -> Mapping[str, Any]:
        """Give the encoder layer (0 is the embedding)."""
        layer = call.get("vision_feature_layer")
        layer = self.base.config.vision_feature_layer if layer is None else layer
        if isinstance(layer, int) and layer < 0:
            layer += len(self._layers) + 1
        return {"vision_feature_layer": layer}

    def patches_per_token(self) -> int:
        """Those that the patch merger joins."""
        return self._merge**2

    @property
    def projector(self) -> nn.Module:
        """A norm, the patch merger and the MLP."""
        return self.base.multi_modal_projector  # type: ignore[no-any-return]

    def project(self, projector: nn.Module, features: Tensor) -> Tensor:
        """Split token inputs into patches again, norm and merge them, and run the MLP."""
        own: Any = projector
        patches = own.norm(features.reshape(*features.shape[:-1], self._merge**2, -1))
        merged = own.patch_merger.merging_layer(patches.transpose(-1, -2).flatten(-2))
        return own.linear_2(own.act(own.linear_1(merged)))  # type: ignore[no-any-return]

    def projector_inputs(self, modality: Modality, raw: Tensor, call: Mapping[str, Any]) -> Tensor:
        """`[S, Dv]` patches as `[S / merge**2, merge**2 * Dv]` token inputs, in raster order."""
        return torch.cat([part.flatten(1) for part in self._tokens(raw, call)])

    def pack(
        self, modality: Modality, values: Tensor, call: Mapping[str, Any]
    ) -> tuple[Tensor, ...]:
        """Mean over the patches of a token; token rows are in order already."""
        values = values.reshape(-1, values.shape[-1])
        counts = [h * w for h, w in self._grids(call)]
        if len(values) == sum(counts):
            return torch.split(values, counts)
        return tuple(part.mean(1) for part in self._tokens(values, call))

    def _tokens(self, patches: Tensor, call: Mapping[str, Any]) -> list[Tensor]:
        """`[S, C]` patches as `[N_i, merge**2, C]` an image."""
        m, found = self._merge, []
        grids = self._grids(call)
        parts = torch.split(patches, [h * w * m**2 for h, w in grids])
        for part, (h, w) in zip(parts, grids, strict=True):
            found.append(part.view(h, m, w, m, -1).transpose(1, 2).reshape(h * w, m**2, -1))
        return found

    def _grids(self, call: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Rows and columns of the tokens of each image."""
        side = int(self.base.config.vision_config.patch_size) * self._merge
        sizes = torch.as_tensor(call["image_sizes"]).tolist()
        return [(height // side, width // side) for height, width in sizes]

    def layouts(
        self, modality: Modality, counts: Sequence[int], call: Mapping[str, Any]
    ) -> Sequence[Layout]:
        """The raster of merged tokens."""
        layouts: list[Layout] = []
        for count, (h, w) in zip(counts, self._grids(call), strict=True):
            if h * w != count:
                raise UnsupportedModelError(f"{count} visual tokens do not fit {h} rows of {w}")
            layouts.append(((1, h, w), None))
        return layouts

    def merged_images(
        self, modality: Modality, call: Mapping[str, Any], runs: Sequence[int], *, geometry: bool
    ) -> tuple[Sequence[int], Mapping[str, Any]]:
        """Count the tokens of each image by its size: a run of placeholders is a row."""
        if call.get("image_sizes") is None:
            raise UnsupportedModelError(
                f"{self.family}: images merged into inputs_embeds cannot be told apart, since each "
                "row has a run of placeholders; pass image_sizes beside them"
            )
        return [h * w for h, w in self._grids(call)], {"image_sizes": call["image_sizes"]}

    def check(self) -> None:
        """A Pixtral encoder, and one feature layer."""
        name, tower = type(self.base).__name__, self.base.vision_tower
        if not hasattr(getattr(tower, "transformer", None), "layers"):
            raise UnsupportedModelError(
                f"{name} with a {type(tower).__name__}: Pixtral encoders are supported"
            )
        layer = self.base.config.vision_feature_layer
        if not isinstance(layer, int):
            raise UnsupportedModelError(
                f"vision_feature_layer={layer!r} joins encoder layers; one integer is supported"
            )
        if not 0 <= self.feature_layer() < len(self._layers):
            raise UnsupportedModelError(
                f"vision_feature_layer={layer} is no encoder layer's output; valid are "
                f"-{len(self._layers)} to -1 and 1 to {len(self._layers)}"
            )
