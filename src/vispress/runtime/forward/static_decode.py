"""The decode step on a static cache: tensors only, so that a compiled model is traced once."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer

from vispress.runtime.kv_cache.hf_compat import cache_of
from vispress.runtime.kv_cache.static import CompressedStaticLayer
from vispress.runtime.stages.decode import Decoding
from vispress.runtime.tokens import masks

if TYPE_CHECKING:
    from vispress.runtime.attachment import Attachment


class StaticDecodeCall:
    """What the layers need for one token; in place of a `ForwardState`."""

    def __init__(self, attachment: "Attachment", cache: Cache, position_ids: Tensor | None) -> None:
        self.attachment, self.cache, self.position_ids = attachment, cache, position_ids
        implementation = attachment.adapter.language_model.config._attn_implementation
        self.decoding = Decoding.of(attachment.decode_step, cache, implementation)

    @classmethod
    def of(cls, attachment: "Attachment", kwargs: Mapping[str, Any]) -> "StaticDecodeCall | None":
        """The step, if this call is one: a single token on a static cache that was compressed."""
        cache, embeds = cache_of(kwargs), kwargs.get("inputs_embeds")
        if cache is None or embeds is None or embeds.shape[1] != 1:
            return None
        layers = getattr(cache, "layers", ())
        if not all(isinstance(layer, StaticLayer) and layer.is_initialized for layer in layers):
            return None
        if not any(isinstance(layer, CompressedStaticLayer) for layer in layers):
            return None
        return cls(attachment, cache, kwargs.get("position_ids"))

    def to(self, *args: Any, **kwargs: Any) -> "StaticDecodeCall":
        """Itself: accelerate's hooks move keyword arguments between devices."""
        return self

    def layer_kwargs(self, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments of a layer whose cache is short; others are left alone."""
        held = self.cache.layers[number]
        if not isinstance(held, CompressedStaticLayer):
            return kwargs
        position = held.logical_length.clone()
        valid = held.step()
        kwargs = kwargs | {
            "attention_mask": self._mask(held, valid, kwargs.get("attention_mask"), hidden),
            "position_embeddings": self._rotary(held, position, hidden, kwargs),
            "position_ids": None,
        }
        if self.decoding is not None:
            kwargs = self.decoding.layer_kwargs(number, hidden, kwargs)
        return kwargs

    def _mask(
        self, held: CompressedStaticLayer, valid: Tensor, given: Tensor | None, hidden: Tensor
    ) -> Tensor:
        implementation = self.attachment.adapter.language_model.config._attn_implementation
        kind = masks.check_implementation(implementation)
        if kind == "flash":
            return valid
        allow = valid.unsqueeze(1)  # [B, 1, C]
        if given is not None and given.ndim == 4:  # the caller's mask over logical positions
            columns = held.slot_positions[:, None, None, :].expand(-1, given.shape[1], 1, -1)
            cut = given.expand(columns.shape[0], -1, -1, -1).gather(3, columns)
            if cut.dtype == torch.bool:
                return cut & allow.unsqueeze(1)
            return cut.masked_fill(~allow.unsqueeze(1), torch.finfo(cut.dtype).min)
        return masks.as_kind(allow, kind, hidden.dtype)

    def _rotary(
        self,
        held: CompressedStaticLayer,
        position: Tensor,
        hidden: Tensor,
        kwargs: Mapping[str, Any],
    ) -> tuple[Tensor, Tensor]:
        given: tuple[Tensor, Tensor] = kwargs["position_embeddings"]
        shift = held._slots.shift
        if shift is None:
            return given
        ids = position.view(1, 1) if self.position_ids is None else self.position_ids
        compact = (ids - shift.unsqueeze(1)).clamp(min=0)
        language_model = self.attachment.adapter.language_model
        rotary: tuple[Tensor, Tensor] = language_model.rotary_emb(hidden, compact)
        return rotary
