"""vLLM's models with fewer visual tokens, where an engine asks for it; else vLLM's own."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.models import llava, qwen2_5_vl, qwen2_vl, qwen3_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from vispress.integrations.vllm.engine import check_engine, check_places
from vispress.integrations.vllm.places import RIDING, inside, laid_out, read, written
from vispress.integrations.vllm.press import Press, modality_of
from vispress.integrations.vllm.processing import ShortPrompts
from vispress.integrations.vllm.signals import Watch
from vispress.integrations.vllm.spec import read_spec


class Compressed:
    """Put before a model of vLLM's: what its encoder gives is cut before it is cached."""

    get_language_model: Any
    vispress: Press | None

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.vispress = None
        spec = read_spec(vllm_config.model_config.hf_config)
        if spec is not None:
            check_engine(spec, vllm_config)
            watch = Watch(spec.plan, self.encoder_attentions(), self.projector())
            self.vispress = Press(spec, watch, self.get_language_model().embed_input_ids)

    def encoder_attentions(self) -> Sequence[nn.Module]:
        """List the encoder's modules that are called with query, key and value."""
        raise NotImplementedError

    def projector(self) -> nn.Module:
        """The module between encoder and LLM."""
        raise NotImplementedError

    def embed_multimodal(self, **call: Any) -> Any:
        """As vLLM's, with the rows that are kept."""
        if self.vispress is None:
            return super().embed_multimodal(**call)  # type: ignore[misc]
        return self._handed(self.vispress.embed(super().embed_multimodal, call), call)  # type: ignore[misc]

    def _handed(self, kept: Sequence[tuple[Tensor, Tensor]], call: dict[str, Any]) -> list[Tensor]:
        """What the engine caches of kept rows and their raster indices."""
        return [values for values, _ in kept]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        """As vLLM's, from folders of newer releases of transformers, too."""
        loaded = super().load_weights(_renamed(weights))  # type: ignore[misc]
        if self.vispress is not None:
            self.vispress.weights_loaded(self.projector())
        return loaded


def _renamed(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """transformers saves CLIP and SigLIP towers without `vision_model` since 5.17."""
    old, new = "vision_tower.", "vision_tower.vision_model."
    for name, weight in weights:
        short = name.replace(new, old, 1)
        yield short.replace(old, new, 1), weight


class Towered(Compressed):
    """LLaVA's: a CLIP or SigLIP tower and a two-layer projector."""

    vision_tower: Any
    multi_modal_projector: nn.Module

    def encoder_attentions(self) -> Sequence[nn.Module]:
        """Those of the tower, up to the feature layer."""
        return [layer.self_attn.attn for layer in self.vision_tower.vision_model.encoder.layers]

    def projector(self) -> nn.Module:
        """The MLP."""
        return self.multi_modal_projector


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
        rule, adapter = self._rule(), self.vispress.spec.adapter
        handed = []
        for number, (values, keep) in enumerate(kept):
            places = inside(rule, adapter, modality_of(call), call, number)[:, keep.cpu()]
            handed.append(torch.cat([values, written(places, values)], dim=1))
        return handed

    def get_mrope_input_positions(self, input_tokens: Any, mm_features: Any) -> Any:
        """As vLLM's for the prompt before anything is dropped."""
        if self.vispress is None:
            return self._rule()(input_tokens, mm_features)
        return laid_out(self._rule(), self.vispress.spec.adapter, input_tokens, mm_features)

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


def _processor(base: Any) -> Any:
    """vLLM's processor of a model class, with short prompts."""

    def build(info: Any, dummy_inputs: Any) -> Any:
        theirs = type(base._processor_factory.processor(info, dummy_inputs))
        return type(theirs.__name__, (ShortPrompts, theirs), {})(info, dummy_inputs)

    factory = base._processor_factory
    return MULTIMODAL_REGISTRY.register_processor(
        build, info=factory.info, dummy_inputs=factory.dummy_inputs
    )


@_processor(llava.LlavaForConditionalGeneration)
class Llava(Towered, llava.LlavaForConditionalGeneration):
    """LLaVA-1.5."""


@_processor(qwen2_vl.Qwen2VLForConditionalGeneration)
class Qwen2VL(Packed, qwen2_vl.Qwen2VLForConditionalGeneration):
    """Qwen2-VL."""


@_processor(qwen2_5_vl.Qwen2_5_VLForConditionalGeneration)
class Qwen25VL(Packed, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""


@_processor(qwen3_vl.Qwen3VLForConditionalGeneration)
class Qwen3VL(Packed, qwen3_vl.Qwen3VLForConditionalGeneration):
    """Qwen3-VL."""
