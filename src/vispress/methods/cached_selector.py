"""What a method that chooses among cached tokens while decoding is asked, and what it is shown."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from vispress.types import Placement


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """Which cached visual tokens deeper layers see, one row a sample; nothing is removed by it.

    Args:
        visual: `[B, V]` bool, places of the sequence (up to its last prefill) that hold visual
            tokens to choose from.
        num_keep: `[B]` int64, how many of them are chosen: the sum of what each video's budget is.
        attention: `[B, V]` in at least fp32, attention of the step before; 0 where not visual.
        selected: `[B, V]` bool, tokens that deeper layers see; all visual ones before any step.
        begun: `[B]` bool, whether a step was taken since the last prefill.
    """

    visual: Bool[Tensor, "B V"]
    num_keep: Int[Tensor, "B"]
    attention: Float[Tensor, "B V"]
    selected: Bool[Tensor, "B V"]
    begun: Bool[Tensor, "B"]


class CachedSelector(ABC):
    """A compressor's part while decoding, for a placement with `Stage.DECODE`.

    Every token that is fed to a model with visual tokens in its cache is one step: the attention of
    one layer is read, and the layers behind it see what is chosen. All keys and values stay cached,
    so that a later step can choose others.
    """

    @abstractmethod
    def decode_placement(self, num_layers: int) -> Placement | None:
        """Say where the choice acts: attention is read of the layer before `Placement.layer`.

        The budget is what is chosen of each video. None: nothing is chosen while decoding.

        Raises:
            ConfigError: The layer is out of range.
        """

    @abstractmethod
    def select_cached(
        self, attention: Float[Tensor, "B V"], before: Selection
    ) -> Bool[Tensor, "B V"]:
        """Choose what deeper layers see in this step, a part of `before.visual`.

        Rows are samples and decide each on its own; nothing may be fetched from the device.

        Args:
            attention: Mean over heads of the step's attention, post-softmax over all keys of the
                layer; 0 where not visual.
            before: What was chosen in the step before, and its attention.
        """
