"""Run a decode step on a static cache: tensors only, so that a compiled model is traced once."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer

from vispress.runtime.hooks.attention import Softmax
from vispress.runtime.kv_cache.hf_compat import LINEAR_LAYERS, cache_of
from vispress.runtime.kv_cache.static import CompressedStaticLayer
from vispress.runtime.plan.plan import Plan
from vispress.runtime.stages.base import RuntimeStage, Watched
from vispress.runtime.tokens import masks


class StaticDecodeCall:
    """What the layers need for one token; in place of a `Running`."""

    attention: Final = None
    """No stage computes the attention of a decode step."""
    shown: Final = None
    """It is no prepared step: watched attention comes to `attend`."""

    def __init__(
        self,
        plan: Plan,
        stages: Sequence[RuntimeStage],
        cache: Cache,
        position_ids: Tensor | None,
    ) -> None:
        self.plan, self.cache, self.position_ids = plan, cache, position_ids
        self.calls = []
        for stage in stages:
            call = None if stage.open_static is None else stage.open_static(plan, cache)
            if call is not None:
                self.calls.append(call)

    @classmethod
    def of(
        cls, plan: Plan, stages: Sequence[RuntimeStage], kwargs: Mapping[str, Any]
    ) -> "StaticDecodeCall | None":
        """Recognise a call of one token on a static cache that was compressed; None for others."""
        cache = cache_of(kwargs)
        if cache is None:
            return None
        layers = [x for x in getattr(cache, "layers", ()) if not isinstance(x, LINEAR_LAYERS)]
        if not all(isinstance(layer, StaticLayer) and layer.is_initialized for layer in layers):
            return None
        if not any(isinstance(layer, CompressedStaticLayer) for layer in layers):
            return None
        plan.remembering.check(cache)
        return cls(plan, stages, cache, kwargs.get("position_ids"))

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
            "position_embeddings": self._rotary(number, held, position, hidden, kwargs),
            "position_ids": None,
        }
        for call in self.calls:
            if call.layer_kwargs is not None:
                kwargs = call.layer_kwargs(number, hidden, kwargs)
        return kwargs

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        implementation: str,
        kwargs: Mapping[str, Any],
    ) -> Tensor | None:
        """Show a watched attention to the stages."""
        for call in self.calls:
            if call.attend is not None:
                watched = Watched(
                    query, key, value, mask, Softmax.of(kwargs), self.plan.shards(query.shape[1])
                )
                mask = call.attend(module.layer_idx, watched)
        return mask

    def _mask(
        self, held: CompressedStaticLayer, valid: Tensor, given: Tensor | None, hidden: Tensor
    ) -> Tensor:
        implementation = self.plan.implementation
        kind = masks.check_implementation(implementation)
        if kind == "flash":
            return valid
        allow = valid.unsqueeze(1)  # [B, 1, C]
        if given is not None and given.ndim == 4:  # the caller's mask over logical positions
            columns = held.slot_positions[:, None, None, :].expand(-1, given.shape[1], 1, -1)
            given = given.to(columns.device)  # sharded models: of the first layer
            cut = given.expand(columns.shape[0], -1, -1, -1).gather(3, columns)
            if cut.dtype == torch.bool:
                return cut & allow.unsqueeze(1)
            return cut.masked_fill(~allow.unsqueeze(1), torch.finfo(cut.dtype).min)
        return masks.as_kind(allow, kind, hidden.dtype)

    def _rotary(
        self,
        number: int,
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
        compact = (ids.to(shift.device) - shift.unsqueeze(1)).clamp(min=0)
        return self.plan.rotary(number, hidden, compact)
