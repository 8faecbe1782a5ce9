"""Pool windows between the layers of the vision encoder in one call."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vispress.adapters.base import Modality, ModelAdapter
from vispress.devices import sent
from vispress.errors import UnsupportedMethodError
from vispress.methods.base import Compressor
from vispress.methods.encoder_pooler import EncoderPooler
from vispress.precision import full_precision
from vispress.runtime.modules import module_of


@dataclass(frozen=True, eq=False)
class PoolingStep:
    """A placement in the encoder.

    Args:
        method: The compressor; the first of its chain.
        pooler: What it does there.
        layers: Encoder layers behind which windows are pooled, ascending.
    """

    method: Compressor
    pooler: EncoderPooler
    layers: tuple[int, ...]


def check_grid(step: PoolingStep, family: str, grid: tuple[int, int] | None) -> None:
    """Refuse encoder sequences whose rows or columns cannot be halved as often.

    Args:
        step: The placement.
        family: Of the model.
        grid: Rows and columns of a sequence's patches; None where they are no grid.

    Raises:
        UnsupportedMethodError: Names the grid and what would work.
    """
    side = 2 ** len(step.layers)
    if grid is None:
        raise UnsupportedMethodError(
            f"{step.method.name} pools windows of 2 x 2 patches, and {family} joins patches into "
            "tokens, or resizes what its vision encoder gives; models in which each patch is a "
            "token (llava, llava_next) can be pooled"
        )
    if grid[0] % side or grid[1] % side:
        raise UnsupportedMethodError(
            f"{step.method.name} pools windows of 2 x 2 patches {len(step.layers)} times, so rows "
            f"and columns must be multiples of {side}; the vision encoder of this {family} model "
            f"has {grid[0]} x {grid[1]} patches. Pool less often, or give pixels of another size "
            "where the model takes them"
        )


class EncoderPool:
    """Pool windows in one call of `get_image_features` or `get_video_features`.

    Args:
        adapter: The family.
        step: The placement.
        modality: Image or video.
        call: Arguments of the call by name.
    """

    def __init__(
        self, adapter: ModelAdapter, step: PoolingStep, modality: Modality, call: Mapping[str, Any]
    ) -> None:
        self.adapter, self.step, self.call = adapter, step, call
        self.modality: Modality = modality
        self.prefix = int(adapter.has_cls)
        self.last = len(adapter.encoder_blocks()) - 1
        self.layer = -1
        self.done = True
        self.sizes: Sequence[Sequence[int]] = ()
        """Tokens of each sequence of each image, before any pooling."""

    def enter(self, number: int, args: Any, kwargs: dict[str, Any]) -> None:
        """A layer is about to run, as it is: its sequences may be of any length.

        Raises:
            UnsupportedMethodError: The grid cannot be halved.
        """
        if number == 0:
            hidden = args[0] if args else kwargs["hidden_states"]
            grid = self.adapter.encoder_grid(self.call)
            check_grid(self.step, self.adapter.family, grid)
            assert grid is not None
            self.whole, self.grid, self.done = grid, grid, False
            length = grid[0] * grid[1]
            assert hidden.shape[1] == self.prefix + length, f"{hidden.shape[1]} patches, {grid}"
            self.sizes = self.adapter.sequences(self.modality, self.call, length)
        self.layer = number

    def leave(self, out: Tensor) -> Tensor:
        """Give what a layer hands on: pooled; behind the last one all places again."""
        if self.done:
            return out
        if self.layer in self.step.layers:
            out = self._pool(out)
        if self.layer == self.last:
            out, self.done = self.restore(out), True
        return out

    def _pool(self, x: Tensor) -> Tensor:
        rows, columns = (side // 2 for side in self.grid)
        grid = torch.unflatten(x[:, self.prefix :], 1, (rows, 2, columns, 2))
        windows = grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        module = module_of(self.adapter.base, 0)
        with full_precision():
            number = self.step.layers.index(self.layer)
            pooled = self.step.pooler.pool(windows, number, module)
        self.grid = rows, columns
        return torch.cat([x[:, : self.prefix], pooled.to(x.dtype)], dim=1)

    def restore(self, x: Tensor) -> Tensor:
        """Every patch in its place, with the value of its window."""
        (rows, columns), (h, w) = self.grid, self.whole
        if (rows, columns) == (h, w):
            return x
        row, column = torch.arange(h) * rows // h, torch.arange(w) * columns // w
        place = self.prefix + (row[:, None] * columns + column).flatten()
        place = torch.cat([torch.arange(self.prefix), place])
        return x.index_select(1, sent(place, x.device))

    # --- what is told afterwards

    def groups(self) -> Tensor | None:
        """No names of groups: what stays is told by geometry."""
        return None

    def per_image(self) -> list[tuple[int, ...]]:
        """Tokens of each image that enter the first layer, then that leave each layer."""
        times = [sum(at < layer for at in self.step.layers) for layer in range(self.last + 2)]
        return [tuple(sum(size // 4**n for size in sizes) for n in times) for sizes in self.sizes]
