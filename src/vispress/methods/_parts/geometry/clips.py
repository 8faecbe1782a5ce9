"""Clips, which are sub-images alone or the frames of a video together, cut into windows.

Windows of one clip have one size, and overlap where its sides are no multiples of theirs.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.devices import sent
from vispress.methods._parts.geometry.grids import rasters
from vispress.methods.base import remembered
from vispress.types import VisualTokens

Window = tuple[int, int, int]
"""Frames, rows and columns of a window."""


def window_starts(n: int, size: int) -> tuple[int, ...]:
    """Lay `ceil(n / size)` windows over `n` places, from the first to the last one.

    They start at `round(i (n - size) / (count - 1))`, ascending; one alone starts at 0.
    """
    count = -(-n // size)
    return tuple(round(i * (n - size) / (count - 1)) for i in range(count)) if count > 1 else (0,)


def window_places(n: int, size: int) -> Int[Tensor, "windows size"]:
    """List the places in each window; a window beyond `n` places repeats the last one."""
    starts = torch.tensor(window_starts(n, size))
    return (starts[:, None] + torch.arange(size)).clamp(max=n - 1)


def window_centres(n: int, size: int) -> Int[Tensor, "windows"]:
    """Find the middle place of each window (of two, the first)."""
    return torch.tensor(window_starts(n, size)) + (min(n, size) - 1) // 2


@remembered
def linear_resize(large: int, small: int) -> Float[Tensor, "small large"]:
    """Write linear interpolation at the middles of `small` equal cells as a matrix, fp64.

    Args:
        large: Places that there are.
        small: Cells, at most as many.
    """
    at = (torch.arange(small, dtype=torch.float64) + 0.5) * large / small - 0.5
    below = at.floor().long().clamp(max=large - 1)
    share, out = at - below, torch.zeros(small, large, dtype=torch.float64)
    rows = torch.arange(small)
    out[rows, below] += 1 - share
    out[rows, (below + 1).clamp(max=large - 1)] += share
    return out


@dataclass(frozen=True)
class Clip:
    """Frames of one size, in windows; tensors on the host.

    Args:
        size: Frames, rows and columns.
        places: `[n]`; its tokens in raster order, frame by frame.
        window: Size of its windows.
    """

    size: tuple[int, int, int]
    places: Int[Tensor, "n"]
    window: Window

    @property
    def shape(self) -> tuple[int, int, int]:
        """Windows along time, height and width."""
        t, h, w = (-(-n // k) for n, k in zip(self.size, self.window, strict=True))
        return t, h, w

    @property
    def centres(self) -> Int[Tensor, "m"]:
        """The token at the middle of each window, in raster order."""
        return self.places[_centres(self.size, self.window)]

    def members(self) -> Int[Tensor, "m k"]:
        """List the tokens of each window, in raster order."""
        return self.places[_members(self.size, self.window)]

    def resized(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B m D"]:
        """Resize values of the clip's tokens to one a window (trilinear)."""
        grid = torch.unflatten(x[:, sent(self.places, x.device)], 1, self.size)
        times, rows, columns = (
            sent(linear_resize(n, m), x.device).to(x)
            for n, m in zip(self.size, self.shape, strict=True)
        )
        return torch.einsum("at,bh,cw,xthwd->xabcd", times, rows, columns, grid).flatten(1, 3)


@remembered
def _members(size: tuple[int, int, int], window: Window) -> Tensor:
    t, h, w = (window_places(n, k) for n, k in zip(size, window, strict=True))
    (_, high, wide), k = size, window
    place = (t[:, None, None, :, None, None] * high + h[:, None, None, :, None]) * wide
    whole = place + w[:, None, None]
    return whole.reshape(-1, k[0] * k[1] * k[2])


@remembered
def _centres(size: tuple[int, int, int], window: Window) -> Tensor:
    t, h, w = (window_centres(n, k) for n, k in zip(size, window, strict=True))
    return ((t[:, None, None] * size[1] + h[:, None]) * size[2] + w).flatten()


def clips(tokens: VisualTokens, window: Window) -> tuple[Clip, ...]:
    """List the clips of a whole image: frames of a video are one, other sub-images alone.

    Args:
        tokens: The bucket. Composed images without a thumbnail are videos.
        window: Size of windows.

    Raises:
        UnsupportedMethodError: The tokens are no full grids (pruned before, or a ragged layout).
    """
    found, _ = rasters(tokens, tokens.num_original)
    frames = [raster.places for raster in found]
    video = tokens.crops is None or not tokens.crops.thumbnail
    if video and len({frame.shape for frame in frames}) == 1:
        frames = [torch.stack(frames)]
    else:
        frames = [frame[None] for frame in frames]
    return tuple(Clip((f.shape[0], f.shape[1], f.shape[2]), f.flatten(), window) for f in frames)


def coordinates(found: tuple[Clip, ...]) -> Int[Tensor, "n 4"]:
    """List each token with its time, row and column; clips follow each other in time."""
    out, before = [], 0
    for clip in found:
        times = torch.arange(before, before + clip.size[0])
        axes = torch.cartesian_prod(times, *(torch.arange(n) for n in clip.size[1:]))
        out.append(torch.cat([clip.places[:, None], axes], dim=1))
        before += clip.size[0]
    return torch.cat(out)


@dataclass(frozen=True)
class Arrangement:
    """Which tokens an image goes to, and where they stand; tensors on the host.

    Args:
        local: Clips in windows; none for no local tokens.
        at: Tokens that show a picture, each with its time, row and column.
        num_global: Global tokens.
        newlines: Newline tokens that stay.
        keep: `[K]`; all places that are taken, ascending.
        order: `[K]`; which of the local, global and newline tokens stands at each.
    """

    local: tuple[Clip, ...]
    at: Int[Tensor, "n 4"]
    num_global: int
    newlines: Int[Tensor, "l"]
    keep: Int[Tensor, "K"]
    order: Int[Tensor, "K"]


def num_windows(local: tuple[Clip, ...]) -> int:
    """Count the windows of an image's clips."""
    return sum(math.prod(clip.shape) for clip in local)


def arranged(
    local: tuple[Clip, ...], at: Int[Tensor, "n 4"], num_global: int, newlines: Int[Tensor, "l"]
) -> Arrangement:
    """Find places for new tokens: centres of windows, and the last others, in order."""
    centres = torch.cat([at[:0, 0], *(clip.centres for clip in local)])
    free = at[~torch.isin(at[:, 0], centres), 0].sort().values
    taken = torch.cat([centres, free[len(free) - num_global :]]).sort().values
    rest = torch.arange(len(centres), len(taken) + len(newlines))
    keep, places = torch.cat([taken, newlines]).sort()
    order = torch.cat([centres.argsort(), rest])[places]
    return Arrangement(local, at, num_global, newlines, keep, order)
