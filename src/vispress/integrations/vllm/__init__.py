"""A vLLM plug-in: pictures enter the engine's LLM with fewer tokens.

vLLM finds `register` through the entry-point group `vllm.general_plugins`. Nothing changes until an
engine is told to compress, in `hf_overrides`:

    vllm serve llava-hf/llava-1.5-7b-hf \\
        --hf-overrides '{"vispress": {"method": "divprune", "keep_ratio": 0.25}}'

The same compressors choose as on transformers. What can be served, and what is refused at start-up,
is told by `docs/serving.md`.
"""

from vispress.integrations.vllm.releases import ARCHITECTURES, supported

__all__ = ["register"]


def register() -> None:
    """Let vLLM build our classes for the families that are served; called by vLLM's plug-ins.

    They are vLLM's own until an engine's configuration has the key `vispress`. On a release of vLLM
    that is not supported, such an engine is refused by name, and all others run as they would.
    """
    from vllm import ModelRegistry

    module = "models" if supported() else "refusal"
    for architecture, (_, name) in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, f"{__name__}.{module}:{name}")
