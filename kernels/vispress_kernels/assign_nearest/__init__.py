"""The most similar target of each token."""

from torch import Tensor

from vispress_kernels._backend import Backend, resolve_backend
from vispress_kernels._checks import check_device, check_dtype, check_floating, check_shape
from vispress_kernels.assign_nearest.reference import assign_nearest_reference

__all__ = ["assign_nearest", "assign_nearest_reference"]


def assign_nearest(
    x: Tensor, targets: Tensor, *, exclude_self: bool = False, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Index and cosine of the nearest target of each row, without the `N x M` matrix.

    Ties go to the lowest index; a NaN is never nearest; norms below 1e-8 count as 1e-8. Bound by
    the tensor cores. Not differentiable: a choice has no gradient (recompute the cosine of the
    chosen pairs where one is needed).

    Args:
        x: Rows `[B, N, D]`, fp16, bf16, fp32 or fp64, any strides.
        targets: Targets `[B, M, D]` of the same dtype, M at least 1.
        exclude_self: Whether row n must not choose target n, as when `targets` is `x`.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        Indices `[B, N]` int64 into the targets, and their cosines `[B, N]` in fp32 (fp64 for fp64
        inputs). A row with nothing to choose from gets index 0 and cosine `-inf`.

    Raises:
        ValueError: Shapes or devices disagree, or there is no target.
        TypeError: The tensors are not of one floating dtype.
    """
    check_shape(x=(x, (None, None, None)))
    check_shape(targets=(targets, (x.shape[0], None, x.shape[2])))
    if targets.shape[1] == 0:
        raise ValueError(f"targets must not be empty, got shape {tuple(targets.shape)}")
    check_floating(x=x)
    check_dtype(x.dtype, targets=targets)
    check_device(x=x, targets=targets)
    x, targets = x.detach(), targets.detach()
    if resolve_backend(backend, x, targets) == "torch":
        return assign_nearest_reference(x, targets, exclude_self)
    from vispress_kernels.assign_nearest.kernel import assign_nearest_triton

    return assign_nearest_triton(x, targets, exclude_self)
