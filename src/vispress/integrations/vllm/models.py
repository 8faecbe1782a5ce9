"""vLLM's models with fewer visual tokens, where an engine asks for it; else vLLM's own."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
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

from vispress.adapters.base import Modality
from vispress.integrations.vllm.compressed import Compressed
from vispress.integrations.vllm.engine import check_crops, check_last_layer
from vispress.integrations.vllm.packed import Packed
from vispress.integrations.vllm.places import frames
from vispress.integrations.vllm.press import as_tiles, modality_of
from vispress.integrations.vllm.processing import ShortPrompts


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

    def _apart(self, call: dict[str, Any]) -> list[dict[str, Any]]:
        """Frames of videos are tiles, as on transformers."""
        return [as_tiles(call)]


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
    """Qwen3-VL; what stands for a video are its frames and the text that tells their times.

    How many tokens of each frame are kept shows behind the encoder only. All rows of the run come
    from there, then, those of the text too: a prompt has a place for each, in whatever order.
    """

    _tokenizer: Any

    def _run(self, modality: Modality, data: Mapping[str, Any]) -> list[int]:
        if modality == "image":
            return super()._run(modality, data)
        assert self.vispress is not None
        times, (_, h, w) = (
            data["timestamps"].data,
            frames(self.vispress.spec.adapter, modality, data),
        )
        config = self.config
        told = qwen3_vl.Qwen3VLMultiModalProcessor.get_video_repl(
            tokens_per_frame=[h * w] * len(times),
            timestamps=times,
            tokenizer=self._tokenizer,
            vision_start_token_id=config.vision_start_token_id,
            vision_end_token_id=config.vision_end_token_id,
            video_token_id=config.video_token_id,
        )
        return list(told.full)

    def _among_text(
        self, values: Tensor, keep: Tensor, modality: Modality, data: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        if modality == "image":
            return values, keep
        ids = torch.tensor(self._run(modality, data))
        visual = ids == self.config.video_token_id
        stays = ~visual
        stays[visual.nonzero()[keep, 0]] = True
        stay = stays.nonzero()[:, 0]
        words = self.get_language_model().embed_input_ids(ids[stay].to(values.device))
        rows = values.new_zeros(len(stay), values.shape[1])
        rows[:, : words.shape[1]] = words
        rows[visual[stay].to(rows.device)] = values
        return rows, stay
