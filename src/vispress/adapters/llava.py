"""LLaVA-1.5: one CLIP (or SigLIP) sequence an image, a projector, no geometry to undo."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vispress.adapters.base import Modality, ModelAdapter, register_adapter
from vispress.types import CropLayout


@register_adapter("LlavaModel")
class LlavaAdapter(ModelAdapter):
    """`LlavaModel`: visual tokens are the encoder's patches, in raster order."""

    family = "llava"

    @property
    def has_cls(self) -> bool:  # type: ignore[override]
        """CLIP encoders have [CLS], SigLIP ones do not."""
        return hasattr(self.encoder.embeddings, "class_embedding")
