"""Say what a method is asked that lets decoder layers compute less for visual tokens."""

from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LayerCompute:
    """What one decoder layer computes for visual tokens; by default all of it.

    Args:
        ffn_ratio: Of the m intermediate neurons of the layer's FFN, visual tokens go through the
            first `m // ffn_ratio`.
        inactive_heads: Attention heads that visual tokens have no part in, ascending: their rows
            get zeros from these heads, and the prompt's text takes nothing of them there. The
            weights of other tokens stay what they were: nothing is renormalised.
        window: Of visual tokens, a visual token attends to those at most `window // 2` rows and
            columns away in its own picture (image, crop or frame), itself included; odd. None for
            all before it. What has no cell in a picture (newlines) counts as text.
        causal: Whether it attends only to those in its window that stand before it.
    """

    ffn_ratio: int = 1
    inactive_heads: tuple[int, ...] = ()
    window: int | None = None
    causal: bool = False

    @property
    def ffn_share(self) -> float:
        """What part of the FFN's neurons visual tokens go through."""
        return 1 / self.ffn_ratio


class ComputePruner(ABC):
    """A compressor's part inside decoder layers, for a placement with `Stage.COMPUTE`.

    Nothing is dropped: all visual tokens enter these layers, which compute less for them. Text, and
    whatever is decoded later, goes through whole layers.
    """

    @abstractmethod
    def compute(self, num_layers: int) -> tuple[LayerCompute, ...]:
        """Say what each layer of an LLM computes for visual tokens.

        Args:
            num_layers: Decoder layers of the LLM.

        Raises:
            ConfigError: A setting does not fit that many layers.
        """
