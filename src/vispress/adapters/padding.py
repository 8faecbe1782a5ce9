"""Padding that a processor put around a picture to make it square, found in its pixels.

Models are not told how large a picture was. A padded one has bands of the processor's mean colour,
which is 0 after normalisation, at two opposite edges; both are equally wide (`expand2square`).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

FLAT = 0.02
"""Largest normalised value of padding: the mean colour, truncated to 1/255, over a deviation of
0.26 or more.
"""


def padded_share(pixels: Float[Tensor, "P C H W"], patch: int) -> Float[Tensor, "P h w"]:
    """Share of each patch that lies in the bands, fp32 in `[0, 1]`.

    Resizing blurs a band's inner edge: it is found up to two pixels too narrow.

    Args:
        pixels: Normalised; H and W are multiples of `patch`.
        patch: Its side, in pixels.
    """
    flat = (pixels.detach().abs() <= FLAT).all(dim=1)
    rows, cols = (_bands(flat.all(dim=2)), _bands(flat.all(dim=1)))
    inside = [1 - band.float().view(len(band), -1, patch).mean(dim=2) for band in (rows, cols)]
    return share_outside(*inside)


def share_outside(rows: Float[Tensor, "P h"], cols: Float[Tensor, "P w"]) -> Float[Tensor, "P h w"]:
    """Share of each cell of a grid outside a rectangle, from how much of each row and column of
    cells is inside.
    """
    return 1 - rows[:, :, None] * cols[:, None, :]


def _bands(flat: Bool[Tensor, "P S"]) -> Bool[Tensor, "P S"]:
    """Equal bands at both ends, as wide as the narrower run of flat lines there.

    None in a picture that is flat all over.
    """
    runs = [line.long().cumprod(dim=1).sum(dim=1) for line in (flat, flat.flip(1))]
    width = torch.minimum(*runs)[:, None]
    place = torch.arange(flat.shape[1], device=flat.device)
    band = (place < width) | (place >= flat.shape[1] - width)
    return band & ~flat.all(dim=1, keepdim=True)
