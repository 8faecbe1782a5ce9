"""Settings of an engine that compression would get wrong, refused at start-up."""

from typing import Any

from vispress.errors import ConfigError
from vispress.integrations.vllm.spec import Spec


def check_engine(spec: Spec, config: Any) -> None:
    """Refuse settings of an engine that do not go with compression.

    Args:
        spec: What is asked.
        config: vLLM's configuration.

    Raises:
        ConfigError: Names the setting and what works.
    """
    name = spec.method.name
    multimodal = config.model_config.multimodal_config
    reads = spec.plan.encoder_signals or spec.method.signals() & {"projector"}
    if config.parallel_config.tensor_parallel_size > 1 and reads:
        raise ConfigError(
            f"{name} reads {', '.join(sorted(reads))}, of which each process has a part under "
            "tensor parallelism; set tensor_parallel_size=1, or a method that reads features alone"
        )
    if getattr(multimodal, "enable_mm_embeds", False):
        raise ConfigError(
            "enable_mm_embeds takes features that no encoder of the engine has seen; leave it out "
            "of an engine that compresses"
        )
    if getattr(multimodal, "video_pruning_rate", None):
        raise ConfigError(
            f"video_pruning_rate={multimodal.video_pruning_rate} prunes, too: leave it out, or "
            f"{name} (vispress has vLLM's own pruning as the method 'evs')"
        )
    if getattr(config.compilation_config, "cudagraph_mm_encoder", False):
        raise ConfigError(
            "cudagraph_mm_encoder runs the encoder past what vispress puts around it; set it to "
            "False"
        )
