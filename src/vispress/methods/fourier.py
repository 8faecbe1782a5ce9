"""Fourier-VLM: keep the low frequencies of the feature map, on a smaller grid.

Wang et al., "Fourier-VLM: Compressing Vision Tokens in the Frequency Domain for Large
Vision-Language Models", 2025, arXiv:2508.06038; its newest version is called Fourier Compressor.
Source: the released compressor (whyisverysmart/Fourier-Compressor 45ab404, Apache-2.0) and its
vectors: 2-D DCT, low-frequency corner, inverse DCT at the reduced size.
Follows the code: orthonormal DCT-II along rows and columns of the encoder's map, inverse at the
size of the corner, at least fp32, before the projector.
Differs: two small matrix products in place of an FFT; any grid that fits the budget. `rescale` is
ours: the orthonormal pair multiplies means by `sqrt(HW / H'W')`, which only fine-tuned checkpoints
expect. Published accuracy needs fine-tuned weights. AnyRes and video go sub-image by sub-image
(reconstructed); on Qwen (`values="features"`) positions are not laid out again for the smaller
grid.
"""

from dataclasses import dataclass
from typing import ClassVar, final, get_args

from torch import Tensor

from vispress.checks import check_choice
from vispress.errors import ConfigError
from vispress.methods._parts.geometry.grids import Values, resample, signals_for
from vispress.methods.base import Compressor, Evidence
from vispress.registry import register_method
from vispress.types import Placement, Signal, Stage, TokenPlan, VisualTokens
from vispress_kernels.dct_lowpass import dct_lowpass


@final
@register_method("fourier")
@dataclass(frozen=True, kw_only=True)
class Fourier(Compressor):
    """Resample each image to a smaller grid by cutting high frequencies, before the projector.

    The count is the largest grid of about the image's aspect within the budget.

    Args:
        rescale: Keep means as they are; False for checkpoints fine-tuned with the released
            compressor.
        values: `"vision_features"`, before the projector, or `"features"`, behind it (Qwen).

    Raises:
        ConfigError: A value is not among its choices.
    """

    summary: ClassVar[str] = "low frequencies of the feature map (2-D DCT), on a smaller grid"
    paper: ClassVar[str] = "Wang et al. 2025, arXiv:2508.06038"
    evidence: ClassVar[Evidence] = "code"
    reads: ClassVar[frozenset[Signal]] = signals_for("vision_features")
    whole: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    merges: ClassVar[bool] = True

    rescale: bool = True
    values: Values = "vision_features"

    def validate(self) -> None:
        if not isinstance(self.rescale, bool):
            raise ConfigError(f"rescale must be true or false, got {self.rescale!r}")
        check_choice("values", self.values, get_args(Values))

    def signals(self) -> frozenset[Signal]:
        return signals_for(self.values)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.PRE_LLM, budget=self.budget(num_layers)),)

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        """Gradients flow through the new values."""

        def shrink(x: Tensor, size: tuple[int, int], small: tuple[int, int]) -> Tensor:
            return dct_lowpass(x, size, small, rescale=self.rescale, backend=tokens.backend)

        return resample(tokens, num_keep, shrink, self.values)
