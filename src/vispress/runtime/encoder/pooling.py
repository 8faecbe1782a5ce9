"""Pool windows between the layers of the vision encoder in one call."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from vispress.adapters.base import Modality, ModelAdapter
from vispress.devices import sent
from vispress.errors import UnsupportedMethodError
from vispress.methods.base import Compressor, remembered
from vispress.methods.encoder_pooler import EncoderPooler
from vispress.precision import full_precision
from vispress.runtime.modules import module_of

Grid = tuple[int, int]
"""Rows and columns."""


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


def check_grids(step: PoolingStep, family: str, grids: Sequence[Grid] | None) -> None:
    """Refuse encoder sequences whose rows or columns cannot be halved as often.

    Args:
        step: The placement.
        family: Of the model.
        grids: Rows and columns of their tokens; None where windows cannot be pooled.

    Raises:
        UnsupportedMethodError: Names the grid and what would work.
    """
    name, side = step.method.name, 2 ** len(step.layers)
    if grids is None:
        raise UnsupportedMethodError(
            f"{name} pools windows of 2 x 2 patches, and the vision encoder of {family} attends in "
            "windows, or what it gives is resized; whole rasters (llava, llava_next, internvl, "
            "qwen2_vl, qwen3_vl) can be pooled"
        )
    for rows, columns in grids:
        if rows % side or columns % side:
            raise UnsupportedMethodError(
                f"{name} pools windows of 2 x 2 patches {len(step.layers)} times, so rows and "
                f"columns of tokens must be multiples of {side}; {rows} x {columns} of this "
                f"{family} model are not. Pool less often, or give pixels of another size where "
                "the model takes them"
            )


class EncoderPool:
    """Pool windows in one call of `get_image_features` or `get_video_features`.

    Where four patches make a token, they are a window, and what becomes of four tokens are the four
    patches of a new one.

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
        self.prefix, self.unit = int(adapter.has_cls), adapter.patches_per_token()
        self.last = len(adapter.encoder_blocks()) - 1
        self.layer = -1
        self.done = True
        self.sizes: Sequence[Sequence[int]] = ()
        """Tokens of each sequence of each image, before any pooling."""
        self.back: Tensor | None = None
        self.pooled = 0
        self._fitting: dict[str, Any] | None = None

    # --- the course of a call

    def enter(self, number: int, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """A layer is about to run: hand it what fits the patches that are left.

        Raises:
            UnsupportedMethodError: A grid cannot be halved.
        """
        kwargs = dict(kwargs)
        hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        if number == 0:
            hidden = self._start(hidden)
        self.layer = number
        if self.pooled and self.adapter.packed:
            kwargs |= self._arguments(kwargs)
        return (hidden, *rest), kwargs

    def _start(self, hidden: Tensor) -> Tensor:
        grids = self.adapter.encoder_grids(self.modality, self.call)
        check_grids(self.step, self.adapter.family, grids)
        assert grids is not None
        self.whole = self.grids = tuple(grids)
        self.done = False
        length = sum(rows * columns for rows, columns in grids)
        found = hidden.shape[-2] - self.prefix
        assert found == self.unit * length, f"{found} patches, {grids}"
        self.sizes = self.adapter.sequences(self.modality, self.call, length)
        packed = self.adapter.packed
        order = None if packed else self.adapter.patch_order(self.modality, self.call)
        if order is None:
            return hidden
        order = _behind(self.prefix, order)
        self.back = sent(order.argsort(), hidden.device)
        return hidden.index_select(-2, sent(order, hidden.device))

    def _arguments(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Rotations of the smaller grids, and where their sequences begin."""
        if self._fitting is None:
            tables, bounds = kwargs["position_embeddings"], kwargs["cu_seqlens"]
            rows = _corners(self.grids, self.whole, self.unit)
            turned = tuple(table[sent(rows, table.device)] for table in tables)
            cut = bounds // 4**self.pooled
            self._fitting = {"position_embeddings": turned, "cu_seqlens": cut}
        return self._fitting

    def leave(self, out: Tensor) -> Tensor:
        """Give what a layer hands on: pooled; behind the last one all places again."""
        if self.done:
            return out
        if self.layer in self.step.layers:
            out = self._pool(out)
        if self.layer == self.last:
            out, self.done = self.restore(out), True
        return out

    def _pool(self, out: Tensor) -> Tensor:
        x = out if out.ndim == 3 else out[None]
        four = sent(_members(self.grids), x.device)
        patches = x[:, self.prefix :]
        joined = self.unit > 1
        windows = torch.unflatten(patches, 1, (-1, self.unit)) if joined else patches[:, four]
        module = module_of(self.adapter.base, 0)
        with full_precision():
            made = self.step.pooler.pool(windows, self.pooled, module).to(x.dtype)
        made = made[:, four.flatten()] if joined else made
        self.grids = tuple((h // 2, w // 2) for h, w in self.grids)
        self.pooled, self._fitting = self.pooled + 1, None
        made = torch.cat([x[:, : self.prefix], made], dim=1)
        return made if out.ndim == 3 else made[0]

    def restore(self, x: Tensor) -> Tensor:
        """Every patch in its place, with the value of its window."""
        if self.pooled:
            order = _spreading(self.whole, self.grids, self.unit, self.prefix)
            x = x.index_select(-2, sent(order, x.device))
        return x if self.back is None else x.index_select(-2, self.back)

    # --- what is told afterwards

    def groups(self) -> Tensor | None:
        """No names of groups: what stays is told by geometry."""
        return None

    def per_image(self) -> list[tuple[int, ...]]:
        """Tokens of each image that enter the first layer, then that leave each layer."""
        times = [sum(at < layer for at in self.step.layers) for layer in range(self.last + 2)]
        return [tuple(sum(size // 4**n for size in sizes) for n in times) for sizes in self.sizes]


@remembered
def _members(grids: tuple[Grid, ...]) -> Int[Tensor, "n 4"]:
    """Tokens of each window, row by row, of all sequences."""
    parts = []
    for h, w in grids:
        rows, columns = 2 * torch.arange(h // 2), 2 * torch.arange(w // 2)
        four = [_places(rows + i // 2, columns + i % 2, w) for i in range(4)]
        parts.append(torch.stack(four, dim=1))
    return _joined(parts, grids)


@remembered
def _corners(grids: tuple[Grid, ...], whole: tuple[Grid, ...], unit: int) -> Int[Tensor, "patches"]:
    """Patches of whole grids that stand where those of the smaller ones do."""
    pairs = zip(grids, whole, strict=True)
    parts = [_places(torch.arange(h), torch.arange(w), own[1]) for (h, w), own in pairs]
    return _rows(_joined(parts, whole), unit)


@remembered
def _spreading(
    whole: tuple[Grid, ...], grids: tuple[Grid, ...], unit: int, prefix: int
) -> Int[Tensor, "patches"]:
    """For each patch of whole grids the one that its window became."""
    parts = [
        _places(torch.arange(h) * few // h, torch.arange(w) * fewer // w, fewer)
        for (h, w), (few, fewer) in zip(whole, grids, strict=True)
    ]
    return _behind(prefix, _rows(_joined(parts, grids), unit))


def _places(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Places of some rows and columns of a raster."""
    return (rows[:, None] * width + columns).flatten()


def _joined(places: Sequence[Tensor], grids: Sequence[Grid]) -> Tensor:
    """Places in sequences that stand one behind the other."""
    starts = accumulate((rows * columns for rows, columns in grids), initial=0)
    return torch.cat([own + start for own, start in zip(places, starts, strict=False)])


def _rows(tokens: Tensor, unit: int) -> Tensor:
    """Rows of the patches of tokens."""
    return (tokens[:, None] * unit + torch.arange(unit)).flatten()


def _behind(prefix: int, places: Tensor) -> Tensor:
    """Places behind [CLS], which stays ahead."""
    return torch.cat([torch.arange(prefix), prefix + places])
