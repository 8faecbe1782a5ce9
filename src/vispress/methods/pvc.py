"""PVC: windows of patches are pooled between the layers of the vision encoder.

LLaVA-UHD v3, 2025, arXiv:2511.21150 (progressive visual compression).
Source: the official code (thunlp/LLaVA-UHD, Apache-2.0), read through a specification; no official
vectors exist.
Follows: windowed token compression. Behind 4 and 18 of 27 encoder layers each window of 2 x 2
patches x_1 ... x_4 becomes one, y = sum_i softmax_i(a_i) * x_i, channel by channel, with a_i =
MLP([x_i ; mean x]) of two layers around a GELU: a sixteenth of the tokens reach the LLM. Zeros in
the last layer make it begin as average pooling. Finer patches, the other half of the paper's
method, are `vispress.patch_embedding.resize_patch_embed`.
Differs: the last layer alone begins with zeros (the code's loader sets both to zero, which stops
every gradient of the MLP). Encoders are those that models have, in place of MoonViT: rotations
are those of the halved grid (Qwen2-VL, Qwen3-VL; the code keeps the first grid's), learned
positions are in the patches since the first layer, and [CLS] is in no window. Where four patches
make a token (Qwen-VL, InternVL) they are a window, and four windows make a token again. Refused are
encoders that attend in windows (Qwen2.5-VL), models that resize behind the encoder
(LLaVA-OneVision), and grids that cannot be halved. Behind the encoder every place has its window's
value, and before the LLM one token a window is kept, at its first place: `compact` positions number
the halved grid, as the paper has them, and M-RoPE keeps those of the whole one. The projector still
runs on all places. AnyRes crops are pooled one by one; where unpadding cuts a window, what is left
of it stays, and of the newlines the first one of each row of windows.
Reconstructed: the layers of an encoder of another depth, at the same share of it.
Untrained it is average pooling inside of the encoder, which the encoder never saw. The authors
train encoder and projector first, then all, by the answer's loss alone (encoder 1e-5, all else 2e-4
and 2e-5). Nobody ships weights for these families.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Final, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vispress.budget import Budget
from vispress.checks import check_ascending
from vispress.devices import sent
from vispress.errors import ConfigError, UnsupportedMethodError
from vispress.methods._parts.geometry.segments import GEOMETRY
from vispress.methods._parts.networks.layers import Dense
from vispress.methods.base import Compressor, Evidence, remembered, upcast
from vispress.methods.encoder_pooler import EncoderPooler
from vispress.registry import register_method
from vispress.types import ModuleShape, Placement, Signal, Stage, TokenPlan, VisualTokens

PUBLISHED: Final = (4, 18)
"""Layers of the authors' encoder that run before each pooling."""
DEPTH: Final = 27
"""Layers that it has."""


class WindowPool(nn.Module):
    """Pool windows by weights of each channel; their mean at first.

    Args:
        width: Of the patches.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = Dense(2 * width, width)
        self.logits = Dense(width, width, zero=True)

    def forward(self, windows: Float[Tensor, "B n 4 D"]) -> Float[Tensor, "B n D"]:
        """Mix the patches of each window, in at least fp32."""
        x = upcast(windows)
        both = torch.cat([x, x.mean(dim=2, keepdim=True).expand_as(x)], dim=-1)
        logits: Tensor = self.logits(F.gelu(self.hidden(both)))
        return (logits.softmax(dim=2) * x).sum(dim=2)


class WindowPools(nn.Module):
    """One `WindowPool` a pooling.

    Args:
        width: Of the patches.
        count: Poolings.
    """

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        for number in range(count):
            self.add_module(str(number), WindowPool(width))

    def forward(self, windows: Float[Tensor, "B n 4 D"], number: int) -> Float[Tensor, "B n D"]:
        """Pool as the pooling of that number does."""
        pooled: Tensor = self.get_submodule(str(number))(windows)
        return pooled


@final
@register_method("pvc")
@dataclass(frozen=True, kw_only=True)
class PVC(Compressor, EncoderPooler):
    """Pool 2 x 2 windows behind some layers of the encoder: a fourth of the tokens each time.

    It takes no budget.

    Args:
        after: Encoder layers that run before each pooling, ascending, at least 1; None for 4 and 18
            of 27, at the same share of another depth.

    Raises:
        BudgetError: A budget is given.
        ConfigError: No layer is named, one is out of range, or they are out of order.
    """

    summary: ClassVar[str] = "windows, pooled between the encoder's layers by learned weights"
    paper: ClassVar[str] = "LLaVA-UHD v3, 2025, arXiv:2511.21150"
    evidence: ClassVar[Evidence] = "read"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY
    takes_budget: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    merges: ClassVar[bool] = True
    trained: ClassVar[bool] = True
    untrained: ClassVar[str] = "it averages each window"

    after: tuple[int, ...] | None = None

    def validate(self) -> None:
        if self.after is not None:
            check_ascending("after", self.after, low=1)

    @property
    def times(self) -> int:
        """How often the grid is halved."""
        return len(PUBLISHED if self.after is None else self.after)

    def pooled_behind(self, num_layers: int) -> tuple[int, ...]:
        after = self.after
        if after is None:
            first, second = (round(layer * num_layers / DEPTH) for layer in PUBLISHED)
            after = (max(1, first), max(2, first + 1, second))  # in order in a shallow one, too
        if after[-1] > num_layers or len(set(after)) < len(after):
            raise ConfigError(
                f"after={self.after!r} stands for layers {list(after)}, and the vision encoder has "
                f"{num_layers} up to its features; give ascending numbers in [1, {num_layers}]"
            )
        return tuple(layer - 1 for layer in after)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        inside = Budget(keep_ratio=4.0**-self.times)
        return (Placement(stage=Stage.ENCODER, budget=inside), *self.before_llm(num_layers))

    def make_module(self, shape: ModuleShape) -> WindowPools:
        """Make a pool for each time that windows are pooled.

        Raises:
            UnsupportedMethodError: The width inside the encoder is not known.
        """
        if shape.encoder_width is None:
            raise UnsupportedMethodError(
                f"{self.name} pools between the layers of the vision encoder, and those of this "
                "model are of an unknown kind; CLIP's and SigLIP's can be pooled"
            )
        return WindowPools(shape.encoder_width, self.times)

    def pool(
        self, windows: Float[Tensor, "B n 4 D"], number: int, module: Callable[..., Any]
    ) -> Float[Tensor, "B n D"]:
        pooled: Tensor = module(windows, number)
        return pooled

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        """Keep one token a window; gradients flow through its value."""
        whole = tokens.num_visual == tokens.num_original
        if not whole or (tokens.grid is None and tokens.crops is None):
            raise UnsupportedMethodError(
                f"{self.name} pools whole images with a known grid, got {tokens.num_visual} of "
                f"{tokens.num_original} tokens, grid={tokens.grid}; put it first in a chain, and "
                "mask no single tokens of an image (a whole image may be masked)"
            )
        if tokens.crops is not None:
            crops = tokens.crops
            keep = first_of_windows(crops.segment, crops.row, crops.col, 2**self.times)
        else:
            assert tokens.grid is not None
            keep = first_of_raster(tokens.grid, 2**self.times)
        keep = sent(keep, tokens.features.device)
        return TokenPlan(keep=keep.expand(tokens.batch, -1), features=tokens.features[:, keep])


@remembered
def first_of_raster(grid: tuple[int, int, int], side: int) -> Int[Tensor, "K"]:
    """Find the first place of each window of frames, ascending."""
    t, h, w = grid
    at = torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w))
    return first_of_windows(at[:, 0], at[:, 1], at[:, 2], side)


def first_of_windows(
    segment: Int[Tensor, "N"], row: Int[Tensor, "N"], column: Int[Tensor, "N"], side: int
) -> Int[Tensor, "K"]:
    """Find the first place of each window, and the first newline of each row of windows.

    Args:
        segment: Sub-image of each place, on the host; -1 for newlines, which end rows.
        row: Inside of its sub-image's whole grid.
        column: Likewise.
        side: Of a window.

    Returns:
        Places, ascending.
    """
    place = torch.arange(len(segment))
    newline = segment < 0
    told_by = torch.where(newline, place - 1, place)
    window = torch.where(newline, -1, column // side)
    names = torch.stack([segment[told_by], row[told_by] // side, window], dim=1)
    _, number = torch.unique(names, dim=0, return_inverse=True)
    first = torch.full((int(number.max()) + 1,), len(place))
    return first.scatter_reduce(0, number, place, "amin").sort().values
