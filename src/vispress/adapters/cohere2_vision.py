"""Cohere2-Vision (Command A Vision) and Aya Vision: SigLIP tiles, 2 x 2 patches a token, SwiGLU.

Their decoder's layers run attention and MLP side by side; three of four have a sliding window, and
the fourth has no rotary embedding.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vispress.adapters.base import Modality, register_adapter
from vispress.adapters.towers import Layout, TowerAdapter
from vispress.errors import UnsupportedModelError
from vispress.types import TwoLayer


@register_adapter("Cohere2VisionModel")
class Cohere2VisionAdapter(TowerAdapter):
    """`Cohere2VisionModel`; to it, and so here, an "image" is one tile.

    Token inputs of the projector are the patches that its pixel shuffle joins, side by side.
    """

    family = "cohere2_vision"

    def feature_layer(self) -> int:
        """The last layer: the model reads the tower's output."""
        return len(self.encoder_attentions()) - 1

    def two_layer(self) -> TwoLayer | None:
        """None: between the linear layers of the projector is a gate, no GELU."""
        return None

    def patches_per_token(self) -> int:
        """Those that the pixel shuffle joins."""
        return int(self.base.config.downsample_factor) ** 2

    def patch_order(self, modality: Modality, call: Mapping[str, Any]) -> Tensor:
        """Order patches as the pixel shuffle joins them."""
        return self._join(torch.arange(self._side**2).view(1, -1, 1)).flatten()

    def _join(self, values: Tensor) -> Tensor:
        """`[P, n, C]` patches as `[P, n / joined, joined * C]` tokens."""
        joined: Tensor = self.projector.pixel_shuffle(values)  # type: ignore[operator]
        return joined.flatten(1, 2)

    def projector_inputs(self, modality: Modality, raw: Tensor, call: Mapping[str, Any]) -> Tensor:
        """Join patches as the projector does."""
        return self._join(raw)

    def project(self, projector: nn.Module, features: Tensor) -> Tensor:
        """Show the projector each token as a tile of its own patches alone."""
        patches = features.reshape(-1, self.patches_per_token(), self._width)
        return projector(patches).view(*features.shape[:-1], -1)  # type: ignore[no-any-return]

    @property
    def _width(self) -> int:
        """Features of a patch."""
        return int(self.base.config.vision_config.hidden_size)

    def sequences(
        self, modality: Modality, call: Mapping[str, Any], length: int
    ) -> Sequence[Sequence[int]]:
        """One a tile."""
        return [[length]] * len(call["pixel_values"])

    def pack(
        self, modality: Modality, values: Tensor, call: Mapping[str, Any]
    ) -> tuple[Tensor, ...]:
        """Mean over the patches that become a token; joined rows are in order already."""
        if values.shape[1] == self._side**2:
            joined = self._join(values)
            values = joined.reshape(*joined.shape[:2], -1, values.shape[-1]).mean(-2)
        return tuple(values.unbind(0))

    def layouts(
        self, modality: Modality, counts: Sequence[int], call: Mapping[str, Any]
    ) -> Sequence[Layout]:
        """The square raster of each tile's tokens."""
        side = self._side // int(self.base.config.downsample_factor)
        return [((1, side, side) if side**2 == n else (1, 1, n), None) for n in counts]

    def check(self) -> None:
        """A SigLIP tower (no [CLS], which would stand among the patches) of whole tokens."""
        if not self._known_tower() or self.has_cls:
            raise UnsupportedModelError(
                f"{type(self.base).__name__} with a {type(self._tower).__name__}: SigLIP towers "
                "are supported"
            )
        factor = int(self.base.config.downsample_factor)
        if self._side % factor:
            raise UnsupportedModelError(
                f"downsample_factor={factor} does not divide the {self._side} patches along an "
                "edge of a tile"
            )


@register_adapter("AyaVisionModel")
class AyaVisionAdapter(Cohere2VisionAdapter):
    """`AyaVisionModel`: the same with a norm in the projector, and a layer that is chosen."""

    family = "aya_vision"

    def feature_layer(self) -> int:
        """`hidden_states[i]` is the output of layer `i - 1`."""
        return TowerAdapter.feature_layer(self)

    def check(self) -> None:
        """As LLaVA's, and whole tokens."""
        TowerAdapter.check(self)
        super().check()
