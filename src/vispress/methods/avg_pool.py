"""Average pooling: each token of a smaller grid is the mean of its window.

Control; adaptive windows `[floor(i n / n'), ceil((i + 1) n / n'))` along rows and columns.
"""

from dataclasses import dataclass
from typing import ClassVar, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from vispress.checks import check_choice
from vispress.devices import sent
from vispress.methods._parts.geometry.grids import Values, resample, signals_for
from vispress.methods.base import Compressor, Evidence, remembered, upcast
from vispress.registry import register_method
from vispress.types import Placement, Signal, Stage, TokenPlan, VisualTokens


@remembered
def window_means(
    large: int, small: int, dtype: torch.dtype = torch.float64
) -> Float[Tensor, "small large"]:
    """Write the mean over the adaptive window of each of `small` places as a matrix."""
    place, window = torch.arange(large), torch.arange(small)[:, None]
    start, end = window * large // small, -((window + 1) * large // -small)
    inside = (place >= start) & (place < end)
    return (inside.double() / (end - start)).to(dtype)


def shrink(
    x: Float[Tensor, "B n D"], size: tuple[int, int], small: tuple[int, int]
) -> Float[Tensor, "B m D"]:
    """Average a raster over windows, in at least fp32."""
    grid = torch.unflatten(upcast(x), 1, size)
    rows, columns = (
        sent(window_means(a, b, grid.dtype), grid.device) for a, b in zip(size, small, strict=True)
    )
    return torch.einsum("rh,bhwd,cw->brcd", rows, grid, columns).flatten(1, 2)


@final
@register_method("avg_pool")
@dataclass(frozen=True, kw_only=True)
class AvgPool(Compressor):
    """Resample each image to a smaller grid by averaging.

    The count is the largest grid of about the image's aspect within the budget.

    Args:
        values: `"features"`, the visual tokens, or `"vision_features"`, before the projector.

    Raises:
        ConfigError: `values` is another word.
    """

    summary: ClassVar[str] = "means over windows, on a smaller grid"
    paper: ClassVar[str] = "control"
    evidence: ClassVar[Evidence] = "control"
    reads: ClassVar[frozenset[Signal]] = signals_for("features")
    whole: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    merges: ClassVar[bool] = True

    values: Values = "features"

    def validate(self) -> None:
        check_choice("values", self.values, get_args(Values))

    def signals(self) -> frozenset[Signal]:
        return signals_for(self.values)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.PRE_LLM, budget=self.budget(num_layers)),)

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        """Gradients flow through the new values."""
        return resample(tokens, num_keep, shrink, self.values)
