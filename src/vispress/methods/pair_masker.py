"""What a method that masks (text row, image token) pairs is asked, and what it is shown."""

from abc import ABC, abstractmethod

from jaxtyping import Bool, Float
from torch import Tensor


class PairMasker(ABC):
    """A compressor's part inside attention, for a placement with `Stage.MASK`.

    It acts in the placement's layer and all behind it. Nothing is dropped or removed from a cache:
    text rows lose sight of some visual tokens, in each layer by that layer's own attention.
    """

    @abstractmethod
    def keep_pairs(
        self, text: Float[Tensor, "B R T"], image: Float[Tensor, "B T N"]
    ) -> Bool[Tensor, "B R N"]:
        """Choose the visual tokens that each text row still attends to, in one layer.

        Rows are decided each on its own, so that a token fed alone is masked as in its sequence;
        nothing may be fetched from the device. Called without gradients, in each layer and step.

        Args:
            text: Attention of the last R of T text rows to all T, post-softmax over all keys of
                the layer and before any pair is masked in it, mean over heads; 0 for later rows.
            image: Attention of the T text rows to the N visual tokens of their sample, likewise.
                Padding of either kind is 0 and may be answered with anything.
        """
