"""vLLM's models with fewer visual tokens, where an engine asks for it; else vLLM's own."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.models import llava
from vllm.multimodal import MULTIMODAL_REGISTRY

from vispress.integrations.vllm.engine import check_engine
from vispress.integrations.vllm.press import Press
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
        kept = self.vispress.embed(super().embed_multimodal, call)  # type: ignore[misc]
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
