"""FastVLM: a convolutional encoder that gives few tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vispress.adapters.base import EncoderBlock, Modality, register_adapter
from vispress.adapters.towers import Layout, TowerAdapter
from vispress.kinds import ENCODER_SIGNALS
from vispress.types import Signal


@register_adapter("FastVlmModel")
class FastVlmAdapter(TowerAdapter):
    """`FastVlmModel`: the encoder has stages of its own, whose attention nobody reads.

    Methods that read the encoder's attention or keys, or merge in it, are refused.
    """

    family = "fast_vlm"
    transformers = "5.24"
    has_cls = False

    def encoder_attentions(self) -> Sequence[nn.Module]:
        """None: timm's modules do not go through `ALL_ATTENTION_FUNCTIONS`."""
        return ()

    def feature_layer(self) -> int:
        """There is one output."""
        return 0

    def feature_choice(self, call: Mapping[str, Any]) -> Mapping[str, Any]:
        """None: the model takes no other."""
        return {}

    def encoder_blocks(self) -> Sequence[EncoderBlock]:
        """None, as above."""
        return ()

    def signals(self) -> frozenset[Signal]:
        """What is read behind the encoder."""
        known = frozenset(Signal) - ENCODER_SIGNALS - {Signal.ENCODER_GROUPS}
        return known | {Signal.VISION_FEATURES}

    def sequences(
        self, modality: Modality, call: Mapping[str, Any], length: int
    ) -> Sequence[Sequence[int]]:
        """One an image."""
        return [[length]] * len(call["pixel_values"])

    def pack(
        self, modality: Modality, values: Tensor, call: Mapping[str, Any]
    ) -> tuple[Tensor, ...]:
        """One feature map is one image."""
        return tuple(values.unbind(0))

    def layouts(
        self, modality: Modality, counts: Sequence[int], call: Mapping[str, Any]
    ) -> Sequence[Layout]:
        """The square feature map of an image that the processor made square."""
        sides = [round(count**0.5) for count in counts]
        return [
            ((1, side, side) if side**2 == count else (1, 1, count), None)
            for side, count in zip(sides, counts, strict=True)
        ]

    def check(self) -> None:
        """Nothing: transformers takes one configuration of the tower's output."""
