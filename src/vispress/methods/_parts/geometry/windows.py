"""Windows of sub-images and what is kept of each, and folding of the rest: parts of VScan."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.devices import sent
from vispress.methods.base import descending, remembered
from vispress.types import CropLayout, VisualTokens
from vispress_kernels import Backend
from vispress_kernels.assign_nearest import assign_nearest
from vispress_kernels.gather_tokens import gather_tokens

WINDOWS = 4
"""Windows along each side of a sub-image."""


def windows(tokens: VisualTokens) -> Int[Tensor, "B N"]:
    """Number each token's window in its sub-image or frame, of 4 x 4; -1 for newlines."""
    if tokens.crops is not None:
        window = _of_crops(tokens.crops)
    else:
        _, h, w = tokens.grid or (1, 1, tokens.num_original)
        window = _of_frames(tokens.num_original, h, w)
    window = sent(window, tokens.index.device)
    if tokens.num_visual == tokens.num_original:
        return window.expand(tokens.batch, -1)
    return window[tokens.index]


@remembered
def _of_frames(count: int, h: int, w: int) -> Tensor:
    place = torch.arange(count)
    return place // w % h * WINDOWS // h * WINDOWS + place % w * WINDOWS // w


@remembered
def _of_crops(crops: CropLayout) -> Tensor:
    segment, window = crops.segment, torch.full_like(crops.segment, -1)
    for each in torch.unique(segment[segment >= 0]).tolist():
        own = segment == each
        r, c = (x[own] * WINDOWS // (int(x[own].max()) + 1) for x in (crops.row, crops.col))
        window[own] = r * WINDOWS + c
    return window


def scan(
    local: Float[Tensor, "b n"],
    whole: Float[Tensor, "b n"],
    window: Int[Tensor, "b n"],
    num_keep: int,
) -> Int[Tensor, "b K"]:
    """Keep half of the tokens by local score, as many a window; the others by the global one."""
    share = num_keep // 2 // WINDOWS**2
    inside = window[:, None] == torch.arange(WINDOWS**2, device=window.device)[:, None]
    first = descending(torch.where(inside, local[:, None], float("-inf")))[..., :share]
    chosen = (torch.zeros_like(inside).scatter_(2, first, True) & inside).any(dim=1)
    best = descending(whole)
    before = chosen.gather(1, best).view(torch.int8).argsort(dim=1, descending=True, stable=True)
    return best.gather(1, before)[:, :num_keep].sort(dim=1).values


def owners(
    x: Float[Tensor, "b n d"],
    local: Float[Tensor, "b n"],
    whole: Float[Tensor, "b n"],
    window: Int[Tensor, "b n"],
    num_keep: int,
    backend: Backend,
) -> Int[Tensor, "b n"]:
    """Find the kept token that each one is averaged into: the most similar, or itself."""
    keep = scan(local, whole, window, num_keep)
    nearest, _ = assign_nearest(x, gather_tokens(x, keep, backend=backend), backend=backend)
    return keep.gather(1, nearest).scatter_(1, keep, keep)
