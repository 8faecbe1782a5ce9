"""Thinkers of Qwen2.5-Omni and Qwen3-Omni: the Qwen-VL encoders; audio is text to vispress.

The thinker is what is compressed (`compress_model(model.thinker, ...)`); a talker behind it hears
what the thinker says.
"""

from typing import Any

from torch import nn

from vispress.adapters.base import register_adapter
from vispress.adapters.qwen_vl import Qwen3VLAdapter, Qwen25VLAdapter


@register_adapter("Qwen2_5OmniThinkerModel")
class Qwen25OmniAdapter(Qwen25VLAdapter):
    """`Qwen2_5OmniThinkerModel`: as Qwen2.5-VL.

    Audio may stand between the frames of a video (`use_audio_in_video`).
    """

    family = "qwen2_5_omni"
    transformers = "5.24"
    _videos_apart = True


@register_adapter("Qwen3OmniMoeThinkerModel")
class Qwen3OmniMoeAdapter(Qwen3VLAdapter):
    """`Qwen3OmniMoeThinkerModel`: as Qwen3-VL, with a mixture of experts."""

    family = "qwen3_omni_moe"
    transformers = "5.24"

    def _merger_parts(self) -> tuple[nn.Module, tuple[Any, Any, Any]]:
        merger: Any = self.projector
        first, act, second = merger.mlp
        return merger.ln_q, (first, act, second)
