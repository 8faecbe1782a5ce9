"""What a method that pools windows between the layers of the vision encoder is asked."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor


class EncoderPooler(ABC):
    """A compressor's part in the encoder, for a placement with `Stage.ENCODER`.

    Behind some layers each window of 2 x 2 patches becomes one, which halves the grid; [CLS] stays.
    Behind the last layer every place has its window's value: the placement before the LLM says
    which of them stay.
    """

    @abstractmethod
    def pooled_behind(self, num_layers: int) -> tuple[int, ...]:
        """Name the encoder layers behind which windows are pooled, 0-based and ascending.

        Args:
            num_layers: Encoder layers up to the one that gives the features.

        Raises:
            ConfigError: There are fewer layers than that.
        """

    @abstractmethod
    def pool(
        self, windows: Float[Tensor, "B n 4 D"], number: int, module: Callable[..., Any]
    ) -> Float[Tensor, "B n D"]:
        """Make one patch of each window; differentiable, in at least fp32.

        Args:
            windows: Of all sequences; packed ones stand in one row.
            number: Which pooling it is, from 0.
            module: Calls what `Compressor.make_module` made, wherever it is by now.
        """
