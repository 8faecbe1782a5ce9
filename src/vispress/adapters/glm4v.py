"""GLM-4.1V, GLM-4.5V and GLM-4.6V: as Qwen2-VL, with patches that a convolution joins."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vispress.adapters.base import Modality, register_adapter
from vispress.adapters.qwen_vl import Qwen2VLAdapter
from vispress.types import TwoLayer


@register_adapter("Glm4vModel")
class Glm4vAdapter(Qwen2VLAdapter):
    """`Glm4vModel`: a convolution makes one row of each 2 x 2 patches ahead of the merger.

    Frames of a video stand apart, with timestamps between, under the token of images: the model
    reads pictures or videos in one call, not both.
    """

    family = "glm4v"
    _videos_apart = True

    def placeholders(self) -> Mapping[Modality, int]:
        """The image token for both."""
        token = self.base.config.image_token_id
        return {"image": token, "video": token}

    def two_layer(self) -> TwoLayer | None:
        """None: the merger is a layer, a norm and a gated MLP."""
        return None

    def project(self, projector: nn.Module, features: Tensor) -> Tensor:
        """Token inputs are rows of tokens already."""
        return projector(features)  # type: ignore[no-any-return]

    def projector_inputs(self, modality: Modality, raw: Tensor, call: Mapping[str, Any]) -> Tensor:
        """What the convolution gave, `[N, D]` in encoder order."""
        return raw


@register_adapter("Glm4vMoeModel")
class Glm4vMoeAdapter(Glm4vAdapter):
    """`Glm4vMoeModel` (GLM-4.5V): experts in most MLPs of the language model."""

    family = "glm4v_moe"


@register_adapter("Glm46VModel")
class Glm46VAdapter(Glm4vAdapter):
    """`Glm46VModel`: GLM-4.6V, its parts those of GLM-4.1V or GLM-4.5V."""

    family = "glm46v"
