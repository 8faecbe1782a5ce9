"""A model of vLLM's whose encoder gives fewer tokens, where an engine asks for it."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from vispress.integrations.vllm.engine import check_engine
from vispress.integrations.vllm.press import Press
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
