"""A smaller grid of tokens that holds the low frequencies of a larger one."""

import torch
from torch import Tensor

from vispress_kernels._backend import Backend, resolve_backend
from vispress_kernels._checks import check_count, check_floating, check_shape
from vispress_kernels.dct_lowpass.reference import (
    basis_on,
    dct_lowpass_reference,
    lowpass_basis,
)

__all__ = ["dct_lowpass", "dct_lowpass_reference", "lowpass_basis"]


def dct_lowpass(
    x: Tensor,
    size: tuple[int, int],
    new_size: tuple[int, int],
    *,
    rescale: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """Shrink a grid of tokens: 2-D DCT, keep the lowest frequencies, inverse DCT at the new size.

    Written as two matrix products for each channel, accurate to fp32 (for 16-bit tokens to 16 bits,
    summed in fp32). Differentiable with either backend. Bound by memory. The bases of a size are
    brought to the device by its first call, which therefore cannot be captured in a CUDA graph.

    Args:
        x: Tokens `[B, H * W, C]` in raster order, fp16, bf16, fp32 or fp64, any strides.
        size: `(H, W)` of the grid.
        new_size: `(H', W')`, each in `[1, H]` and `[1, W]`.
        rescale: Whether to divide by the gain of the orthonormal transforms,
            `sqrt(H W / (H' W'))`, so that a constant stays what it is.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        A new contiguous tensor `[B, H' * W', C]` with the dtype of `x`.

    Raises:
        ValueError: `x` does not have `H * W` tokens, or a size is out of range.
        TypeError: `x` is not floating.
    """
    (H, W), (P, Q) = size, new_size
    check_count("height", H, 1, 2**31 - 1)
    check_count("width", W, 1, 2**31 - 1)
    check_count("new height", P, 1, H)
    check_count("new width", Q, 1, W)
    check_shape(x=(x, (None, H * W, None)))
    check_floating(x=x)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = basis_on(H, P, rescale, x.device, dtype)
    columns = basis_on(W, Q, rescale, x.device, dtype)
    if resolve_backend(backend, x) == "torch":
        return dct_lowpass_reference(x, rows, columns)
    from vispress_kernels.dct_lowpass.kernel import dct_lowpass_triton

    return dct_lowpass_triton(x, rows, columns)
