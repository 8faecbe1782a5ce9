"""Qwen3.5 and Qwen3.5-MoE: Qwen3-VL without DeepStack; most decoder layers are gated delta nets."""

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from vispress.adapters.base import register_adapter
from vispress.adapters.qwen_vl import Qwen3VLAdapter


@register_adapter("Qwen3_5Model")
class Qwen35Adapter(Qwen3VLAdapter):
    """`Qwen3_5Model`: three of four decoder layers have linear attention.

    Their states see the rows that live in them alone; there is nothing of them to read or evict.
    """

    family = "qwen3_5"
    transformers = "5.24"
    attention_every: ClassVar[int] = 4
    """One decoder layer in so many has attention weights, in checkpoints."""

    def encoder_taps(self) -> Sequence[nn.Module]:
        """None: there is no DeepStack."""
        return ()


@register_adapter("Qwen3_5MoeModel")
class Qwen35MoeAdapter(Qwen35Adapter):
    """`Qwen3_5MoeModel`: the same with experts in all MLPs of the language model."""

    family = "qwen3_5_moe"
