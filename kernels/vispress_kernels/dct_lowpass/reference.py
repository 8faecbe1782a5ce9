"""What `dct_lowpass` means, in plain torch."""

import math
from functools import cache

import torch
from torch import Tensor


def _dct(n: int) -> Tensor:
    """The orthonormal DCT-II as a matrix `[n, n]`, fp64."""
    k = torch.arange(n, dtype=torch.float64)
    rows = torch.cos(math.pi * (k + 0.5) * k[:, None] / n) * math.sqrt(2 / n)
    rows[0] /= math.sqrt(2)
    return rows


def lowpass_basis(n: int, m: int) -> Tensor:
    """`[m, n]` fp64: n-point DCT, keep the m lowest frequencies, m-point inverse DCT."""
    return _dct(m).T @ _dct(n)[:m]


@cache
def basis_on(n: int, m: int, rescale: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`lowpass_basis(n, m)`, over its gain if `rescale`, on a device; not to be written to.

    Made once and kept for good, because a captured graph goes on reading it.
    """
    gain = math.sqrt(n / m) if rescale else 1.0
    with torch.inference_mode(False):  # kept: a later call may need gradients
        return (lowpass_basis(n, m) / gain).to(device, dtype)


def dct_lowpass_reference(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`rows X columns^T` for each channel of `[B, H * W, C]`; differentiable."""
    grid = torch.unflatten(x.to(rows.dtype), 1, (rows.shape[1], columns.shape[1]))
    narrow = torch.einsum("qw,bhwc->bhqc", columns, grid)
    return torch.einsum("ph,bhqc->bpqc", rows, narrow).flatten(1, 2).to(x.dtype).contiguous()
