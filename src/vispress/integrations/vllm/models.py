"""vLLM's models with fewer visual tokens, where an engine asks for it; else vLLM's own."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.models import (
    interns1,
    llava,
    llava_next,
    llava_onevision,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_vl,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vispress.integrations.vllm.engine import (
    check_crops,
    check_engine,
    check_last_layer,
    check_places,
)
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
            watch = Watch(spec.plan, self.encoder_attentions(), self.projector_entry())
            self.vispress = Press(spec, watch, self.get_language_model().embed_input_ids)

    def encoder_attentions(self) -> Sequence[nn.Module]:
        """List the encoder's modules that are called with query, key and value."""
        raise NotImplementedError

    def projector(self) -> nn.Module:
        """The module between encoder and LLM."""
        raise NotImplementedError

    def projector_entry(self) -> nn.Module:
        """The module that is called with what the projector is."""
        return self.projector()

    def embed_multimodal(self, **call: Any) -> Any:
        """As vLLM's, with the rows that are kept."""
        if self.vispress is None:
            return super().embed_multimodal(**call)  # type: ignore[misc]
        handed: list[Tensor] = []
        for part in self._apart(call):
            kept = self.vispress.embed(super().embed_multimodal, part)  # type: ignore[misc]
            handed += self._handed(kept, part)
        return handed

    def _apart(self, call: dict[str, Any]) -> list[dict[str, Any]]:
        """The encoder calls that vispress understands, for one of vLLM's."""
        return [call]

    def _handed(self, kept: Sequence[tuple[Tensor, Tensor]], call: dict[str, Any]) -> list[Tensor]:
        """What the engine caches of kept rows and their raster indices."""
        return [values for values, _ in kept]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        """As vLLM's, from folders of newer releases of transformers, too."""
        loaded = super().load_weights(self._renamed(weights))  # type: ignore[misc]
        if self.vispress is not None:
            self.vispress.weights_loaded(self.projector())
        return loaded

    def _renamed(self, weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        """Weights by the names that vLLM knows."""
        return weights


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

    def _renamed(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Towers are saved without `vision_model` since transformers 5.17."""
        old, new = "vision_tower.", "vision_tower.vision_model."
        for name, weight in weights:
            yield name.replace(new, old, 1).replace(old, new, 1), weight


class AnyRes(Towered):
    """LLaVA's with crops: vLLM pads their number to that of the largest picture of a request."""

    def _apart(self, call: dict[str, Any]) -> list[dict[str, Any]]:
        """The call with the crops that pictures have."""
        assert self.vispress is not None
        if modality_of(call) == "video":
            pixels = call["pixel_values_videos"]
            if isinstance(pixels, Tensor):
                return [call]
            return [_item(call, number) for number in range(len(pixels))]
        crops = [len(one) for one in self.vispress.spec.adapter.sequences("image", call, 0)]
        pixels = [own[:count] for own, count in zip(call["pixel_values"], crops, strict=True)]
        return [{**call, "pixel_values": pixels if len({*crops}) > 1 else torch.stack(pixels)}]


def _item(call: dict[str, Any], number: int) -> dict[str, Any]:
    """One item of a call, as a call of its own."""
    one = slice(number, number + 1)
    own = {name: value[one] for name, value in call.items()}
    return {**own, "pixel_values_videos": call["pixel_values_videos"][number][None]}


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


@_processor(llava_next.LlavaNextForConditionalGeneration)
class LlavaNext(AnyRes, llava_next.LlavaNextForConditionalGeneration):
    """LLaVA-NeXT."""


@_processor(llava_onevision.LlavaOnevisionForConditionalGeneration)
class LlavaOnevision(AnyRes, llava_onevision.LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self.vispress is not None:
            check_crops(vllm_config)


@_processor(interns1.InternS1ForConditionalGeneration)
class InternVL(Towered, interns1.InternS1ForConditionalGeneration):
    """InternVL as transformers has it; tokens are kept of each tile."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self.vispress is not None:
            check_last_layer(self.vispress.spec)

    def encoder_attentions(self) -> Sequence[nn.Module]:
        """Those of InternViT."""
        return [layer.attention.attn for layer in self.vision_tower.encoder.layer]

    def _renamed(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        """As they are."""
        return weights


@_processor(qwen2_vl.Qwen2VLForConditionalGeneration)
class Qwen2VL(Packed, qwen2_vl.Qwen2VLForConditionalGeneration):
    """Qwen2-VL."""


@_processor(qwen2_5_vl.Qwen2_5_VLForConditionalGeneration)
class Qwen25VL(Packed, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""

    def projector_entry(self) -> nn.Module:
        """The merger's norm: the merger itself, made to be compiled, calls no hooks."""
        return self.visual.merger.ln_q  # type: ignore[no-any-return]


@_processor(qwen3_vl.Qwen3VLForConditionalGeneration)
class Qwen3VL(Packed, qwen3_vl.Qwen3VLForConditionalGeneration):
    """Qwen3-VL."""
