"""Models of vLLM's with a packed encoder and positions of three axes: Qwen's."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vispress.adapters.base import Modality
from vispress.integrations.vllm.compressed import Compressed
from vispress.integrations.vllm.engine import check_places
from vispress.integrations.vllm.places import (
    RIDING,
    data_of,
    inside,
    laid_out,
    read,
    tokens_alone,
    written,
)
from vispress.integrations.vllm.press import modality_of


class Packed(Compressed):
    """Qwen's: a packed encoder, and positions of three axes, which ride beside the features."""

    visual: Any
    _riding: tuple[Tensor, Tensor] | None = None
    """Rows of the coming forward, and what their positions are to be moved by."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self.vispress is not None:
            check_places(vllm_config)

    def encoder_attentions(self) -> Sequence[nn.Module]:
        """Those of the blocks."""
        return [block.attn.attn for block in self.visual.blocks]

    def projector(self) -> nn.Module:
        """The merger."""
        return self.visual.merger  # type: ignore[no-any-return]

    def _handed(self, kept: Sequence[tuple[Tensor, Tensor]], call: dict[str, Any]) -> list[Tensor]:
        """The rows, and where they lie in their picture."""
        assert self.vispress is not None
        rule, modality = self._rule(), modality_of(call)
        handed = []
        for number, (values, keep) in enumerate(kept):
            data = data_of(modality, call, number)
            rows, stay = self._among_text(values, keep.cpu(), modality, data)
            places = inside(rule, self._run, modality, data)[:, stay]
            handed.append(torch.cat([rows, written(places, rows)], dim=1))
        return handed

    def _among_text(
        self, values: Tensor, keep: Tensor, modality: Modality, data: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Rows that stand for an image or video, and which of its whole run they are."""
        return values, keep

    def _run(self, modality: Modality, data: Mapping[str, Any]) -> list[int]:
        """Token ids of a whole image or video."""
        assert self.vispress is not None
        return tokens_alone(self.vispress.spec.adapter, modality, data)

    def get_mrope_input_positions(self, input_tokens: Any, mm_features: Any) -> Any:
        """As vLLM's for the prompt before anything is dropped."""
        if self.vispress is None:
            return self._rule()(input_tokens, mm_features)
        return laid_out(self._rule(), self._run, input_tokens, mm_features)

    def _rule(self) -> Any:
        return super().get_mrope_input_positions  # type: ignore[misc]

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """As vLLM's; remembers for the forward what rides beside the features."""
        self._riding = None
        if self.vispress is not None and multimodal_embeddings and is_multimodal is not None:
            places = torch.cat([read(one[:, -RIDING:]) for one in multimodal_embeddings], dim=1)
            self._riding = is_multimodal.nonzero()[:, 0].to(places.device), places
            multimodal_embeddings = [one[:, :-RIDING] for one in multimodal_embeddings]
        return super().embed_input_ids(  # type: ignore[misc, no-any-return]
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )

    def forward(self, input_ids: Any, positions: Tensor, *rest: Any, **more: Any) -> Any:
        """As vLLM's, visual rows at their own places.

        Written into the engine's buffer, which it fills anew at each step: captured graphs read it.
        """
        if self._riding is not None:
            rows, places = self._riding
            positions[:, rows] += places
            self._riding = None
        return super().forward(input_ids, positions, *rest, **more)  # type: ignore[misc]
