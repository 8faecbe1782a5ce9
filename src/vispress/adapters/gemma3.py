"""Gemma 3: SigLIP patches pooled to a fixed number of tokens, which see each other in the LLM."""

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from vispress.adapters.base import EncoderBlock, Modality, register_adapter
from vispress.adapters.towers import Layout, TowerAdapter
from vispress.errors import UnsupportedModelError
from vispress.types import TwoLayer


@register_adapter("Gemma3Model")
class Gemma3Adapter(TowerAdapter):
    """`Gemma3Model`: the projector pools windows of patches, behind which a token goes alone.

    Its masks, one for each kind of layer, come from the model and are cut by the runtime.
    """

    family = "gemma3"
    transformers = "5.24"

    @property
    def _tokens(self) -> int:
        """Tokens along one edge of an image."""
        return isqrt(int(self.base.config.mm_tokens_per_image))

    def feature_layer(self) -> int:
        """The last layer."""
        return len(self.encoder_attentions()) - 1

    def feature_choice(self, call: Mapping[str, Any]) -> Mapping[str, Any]:
        """Nothing is chosen."""
        return {}

    def encoder_blocks(self) -> Sequence[EncoderBlock]:
        """None: windows of patches are pooled, which merged ones do not form."""
        return ()

    def patches_per_token(self) -> int:
        """Those of a window."""
        return (self._side // self._tokens) ** 2

    def patch_order(self, modality: Modality, call: Mapping[str, Any]) -> Tensor:
        """Order patches by window."""
        tokens, window = self._tokens, self._side // self._tokens
        raster = torch.arange(self._side**2).view(tokens, window, tokens, window)
        return raster.transpose(1, 2).flatten()

    def sequences(
        self, modality: Modality, call: Mapping[str, Any], length: int
    ) -> Sequence[Sequence[int]]:
        """One an image."""
        return [[length]] * len(call["pixel_values"])

    def two_layer(self) -> TwoLayer | None:
        """None: the projector is a norm and one matrix."""
        return None

    def project(self, projector: nn.Module, features: Tensor) -> Tensor:
        """Norm and matrix, for tokens that are pooled already."""
        own: Any = projector
        normed = own.mm_soft_emb_norm(features)
        return (normed @ own.mm_input_projection_weight).type_as(features)  # type: ignore[no-any-return]

    def projector_inputs(self, modality: Modality, raw: Tensor, call: Mapping[str, Any]) -> Tensor:
        """`[P, n, Dv]` patches as `[P, N, Dv]` pooled token inputs."""
        return torch.stack(self.pack(modality, raw, call))

    def pack(
        self, modality: Modality, values: Tensor, call: Mapping[str, Any]
    ) -> tuple[Tensor, ...]:
        """Mean over the patches of a window; token rows are in order already."""
        if values.shape[1] != self._tokens**2:
            square = values.transpose(1, 2).reshape(len(values), -1, self._side, self._side)
            pooled = nn.functional.avg_pool2d(square, self._side // self._tokens)
            values = pooled.flatten(2).transpose(1, 2)
        return tuple(values.unbind(0))

    def layouts(
        self, modality: Modality, counts: Sequence[int], call: Mapping[str, Any]
    ) -> Sequence[Layout]:
        """The raster of pooled tokens; an image of the "pan and scan" kind is one of its crops."""
        return [((1, self._tokens, self._tokens), None) for _ in counts]

    def check(self) -> None:
        """A known tower, and windows that cover its patches."""
        if not self._known_tower():
            raise UnsupportedModelError(
                f"{type(self.base).__name__} with a {type(self._tower).__name__}: SigLIP towers "
                "are supported"
            )
        tokens = int(self.base.config.mm_tokens_per_image)
        if self._tokens**2 != tokens or self._side % self._tokens:
            raise UnsupportedModelError(
                f"mm_tokens_per_image={tokens}: a square number is supported whose root divides "
                f"the {self._side} patches along an edge"
            )
