"""What `dct_lowpass` means, in plain torch."""

import math
from functools import cache

import torch
from torch import Tensor


@cache
def _basis(n: int, m: int) -> Tensor:
    return _dct(m)[:m].T @ _dct(n)[:m]


def _dct(n: int) -> Tensor:
    """The orthonormal DCT-II as a matrix `[n, n]`, fp64."""
    k = torch.arange(n, dtype=torch.float64)
    rows = torch.cos(math.pi * (k + 0.5) * k[:, None] / n) * math.sqrt(2 / n)
    rows[0] /= math.sqrt(2)
    return rows


def lowpass_basis(n: int, m: int) -> Tensor:
    """`[m, n]` fp64: n-point DCT, keep the m lowest frequencies, m-point inverse DCT."""
    return _basis(n, m).clone()


def dct_lowpass_reference(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`rows X columns^T` for each channel of `[B, H * W, C]`; differentiable."""
    grid = torch.unflatten(x.to(rows.dtype), 1, (rows.shape[1], columns.shape[1]))
    narrow = torch.einsum("qw,bhwc->bhqc", columns, grid)
    return torch.einsum("ph,bhqc->bpqc", rows, narrow).flatten(1, 2).to(x.dtype)
