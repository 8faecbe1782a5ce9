"""Idefics3 and SmolVLM: pictures cut into sub-pictures, 2 x 2 (or more) patches in one token."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vispress.adapters.base import EncoderBlock, Modality, register_adapter
from vispress.adapters.towers import Layout, TowerAdapter
from vispress.errors import UnsupportedModelError
from vispress.types import TwoLayer


@register_adapter("Idefics3Model")
class Idefics3Adapter(TowerAdapter):
    """`Idefics3Model`; to it, and so here, an "image" is one sub-picture.

    Placeholders of a sub-picture stand together, with words for its row and column in front, which
    are text. The model gives features by sample, all its sub-pictures one behind the other.
    """

    family = "idefics3"

    @property
    def language_model(self) -> Any:
        """The decoder stack."""
        return self.base.text_model

    @property
    def decoder_layers(self) -> Sequence[nn.Module]:
        """Its layers."""
        return self.base.text_model.layers  # type: ignore[no-any-return]

    @property
    def _tower(self) -> Any:
        return self.base.vision_model

    @property
    def _scale(self) -> int:
        """Patches along one edge of a token."""
        return int(self.base.config.scale_factor)

    def feature_layer(self) -> int:
        """The last layer."""
        return len(self.encoder_attentions()) - 1

    def feature_choice(self, call: Mapping[str, Any]) -> Mapping[str, Any]:
        """Nothing is chosen."""
        return {}

    def encoder_blocks(self) -> Sequence[EncoderBlock]:
        """None: sub-pictures that are padding leave ahead of the encoder, which it alone knows."""
        return ()

    def patches_per_token(self) -> int:
        """Those that the pixel shuffle joins."""
        return self._scale**2

    @property
    def projector(self) -> nn.Module:
        """The pixel shuffle and one matrix."""
        return self.base.connector  # type: ignore[no-any-return]

    def two_layer(self) -> TwoLayer | None:
        """None: the projector is one matrix."""
        return None

    def project(self, projector: nn.Module, features: Tensor) -> Tensor:
        """The matrix, for tokens that are joined already."""
        own: Any = projector
        return own.modality_projection(features)  # type: ignore[no-any-return]

    def projector_inputs(self, modality: Modality, raw: Tensor, call: Mapping[str, Any]) -> Tensor:
        """`[P, n, Dv]` patches as `[P, N, scale**2 * Dv]` token inputs."""
        return self.base.connector.pixel_shuffle(raw, self._scale)  # type: ignore[no-any-return]

    def pack(
        self, modality: Modality, values: Tensor, call: Mapping[str, Any]
    ) -> tuple[Tensor, ...]:
        """Mean over the patches that the pixel shuffle joins; joined rows are in order already."""
        if values.shape[1] == self._side**2:
            joined = self.base.connector.pixel_shuffle(values, self._scale)
            values = joined.unflatten(-1, (self._scale**2, -1)).mean(-2)
        return tuple(values.unbind(0))

    def features(self, modality: Modality, output: Any) -> tuple[Tensor, ...]:
        """One for each sub-picture, in order of samples."""
        side = self._side // self._scale
        return torch.split(torch.cat(list(output.pooler_output)), side**2)

    def layouts(
        self, modality: Modality, counts: Sequence[int], call: Mapping[str, Any]
    ) -> Sequence[Layout]:
        """The raster of each sub-picture."""
        shown = call.get("pixel_attention_mask")
        if shown is not None:
            whole = shown.bool().flatten(-2)
            if bool((whole.any(-1) & ~whole.all(-1)).any()):
                raise UnsupportedModelError(
                    f"{self.family}: pixel_attention_mask hides a part of a sub-picture, which "
                    "attention of the encoder would count; let the processor resize (do_resize)"
                )
        side = self._side // self._scale
        return [((1, side, side) if side**2 == n else (1, 1, n), None) for n in counts]

    def check(self) -> None:
        """A known tower whose patches the pixel shuffle can join."""
        if not self._known_tower():
            raise UnsupportedModelError(
                f"{type(self.base).__name__} with a {type(self._tower).__name__}: towers as "
                "transformers has them are supported"
            )
        if self._side % self._scale:
            raise UnsupportedModelError(
                f"scale_factor={self._scale} does not divide the {self._side} patches along an edge"
            )


@register_adapter("SmolVLMModel")
class SmolVLMAdapter(Idefics3Adapter):
    """`SmolVLMModel`: as Idefics3; frames of a video are images to it."""

    family = "smolvlm"
