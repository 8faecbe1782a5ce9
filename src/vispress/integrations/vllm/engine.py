"""Settings of an engine that compression would get wrong, refused at start-up."""

from collections.abc import Callable
from typing import Any, Final

from vispress.adapters.base import Modality
from vispress.errors import ConfigError, UnsupportedMethodError, UnsupportedModelError
from vispress.integrations.vllm.spec import Spec

_ROTARY_BASE: Final = 10000.0
"""Of every vision encoder of Qwen's that vLLM runs, whatever its configuration says."""

_CROPS: Final = "anyres_max_9"


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
    check_modalities(spec, multimodal.get_limit_per_prompt)
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
    if getattr(config.lora_config, "enable_tower_connector_lora", False):
        raise ConfigError(
            "enable_tower_connector_lora counts the encoder's rows by those that are kept; leave "
            "it out (adapters of the LLM work)"
        )
    for setting in ("cudagraph_mm_encoder", "compile_mm_encoder"):
        if getattr(config.compilation_config, setting, False):
            raise ConfigError(
                f"{setting} runs the vision encoder past what vispress puts around it; set it to "
                "False"
            )


def check_modalities(spec: Spec, count: Callable[[Modality], int]) -> None:
    """Refuse pictures or videos that vLLM serves and the plug-in does not.

    Args:
        spec: What is asked.
        count: How many there are, or may be, of a modality.

    Raises:
        UnsupportedMethodError: Names the modality and the setting that leaves it out.
    """
    for modality in spec.refused:
        if count(modality):
            raise UnsupportedMethodError(
                f"{spec.method.name} reads the prompt, to which the frames of {modality}s of "
                f"{spec.adapter.family} bring text that vLLM writes behind the choice; set "
                f'limit_mm_per_prompt={{"{modality}": 0}}, or a method that reads no text'
            )


def check_places(config: Any) -> None:
    """Refuse what would give kept tokens of a model with three-axis positions other places.

    Args:
        config: vLLM's configuration.

    Raises:
        ConfigError: Names the setting and what works.
        UnsupportedModelError: vLLM would run the vision encoder otherwise than transformers.
    """
    vision = config.model_config.hf_config.vision_config
    base = (getattr(vision, "rope_parameters", None) or {}).get("rope_theta", _ROTARY_BASE)
    if float(base) != _ROTARY_BASE:
        raise UnsupportedModelError(
            f"the vision encoder has the rotary base {base:g}, and vLLM runs all with "
            f"{_ROTARY_BASE:g}: its features, and what is kept, would be others"
        )
    if config.parallel_config.pipeline_parallel_size > 1:
        raise ConfigError(
            "positions of kept tokens come from the encoder, which the first pipeline stage alone "
            "runs; set pipeline_parallel_size=1"
        )
    mode = config.compilation_config.cudagraph_mode
    if mode is not None and mode.mixed_mode().name == "FULL":
        raise ConfigError(
            "cudagraph_mode=FULL records prefills with the positions of other prompts; set it to "
            "FULL_AND_PIECEWISE or PIECEWISE"
        )
    if config.speculative_config is not None:
        raise ConfigError(
            "speculative decoding embeds pictures again, without the positions of kept tokens; "
            "leave speculative_config out"
        )


def check_crops(config: Any) -> None:
    """Refuse a limit of crops that vLLM does not look at.

    Args:
        config: vLLM's configuration, of LLaVA-OneVision.

    Raises:
        UnsupportedModelError: Names it.
    """
    limit = getattr(config.model_config.hf_config, "vision_aspect_ratio", _CROPS)
    if limit != _CROPS:
        raise UnsupportedModelError(
            f"vision_aspect_ratio={limit!r}: vLLM packs the crops of every LLaVA-OneVision by "
            f"{_CROPS!r}"
        )


def check_last_layer(spec: Spec) -> None:
    """Refuse a feature layer that vLLM does not look at.

    Args:
        spec: What is asked, of an InternVL.

    Raises:
        UnsupportedModelError: Names it.
    """
    layer, last = spec.adapter.feature_layer(), len(spec.adapter.encoder_attentions()) - 1
    if layer != last:
        raise UnsupportedModelError(
            f"features come from layer {layer} of the vision encoder, and vLLM takes those of the "
            f"last one, {last}, of every InternVL"
        )
