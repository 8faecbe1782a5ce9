"""Select tokens by index, in several tensors at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vispress_kernels._backend import Backend, resolve_backend
from vispress_kernels._checks import check_dtype, check_shape
from vispress_kernels.gather_tokens.reference import gather_tokens_reference

__all__ = ["gather_tokens", "gather_tokens_many", "gather_tokens_reference"]


def gather_tokens(x: Tensor, keep: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Select tokens by index, exactly (a copy, no arithmetic): `out[b, k] = x[b, keep[b, k]]`.

    Differentiable with either backend. Bound by memory: each kept element is read and written once.

    Args:
        x: Tokens `[B, N, ...]`, any real dtype (fp64 runs the reference), any strides.
        keep: Indices `[B, K]` into axis 1, int64, in `[0, N)`. Order and repeats are kept as given.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        A new contiguous tensor `[B, K, ...]` with the dtype and device of `x`.

    Raises:
        ValueError: `x` and `keep` disagree in batch size or device. Indices are not range-checked:
            that would cost a device synchronisation.
        TypeError: `keep` is not int64, or `x` is complex.
    """
    return gather_tokens_many((x,), keep, backend=backend)[0]


def gather_tokens_many(
    xs: Sequence[Tensor], keep: Tensor, *, backend: Backend = "auto"
) -> tuple[Tensor, ...]:
    """`gather_tokens` of several tensors that share `keep`, in one launch.

    Args:
        xs: Tensors `[B, N, ...]` of any widths and dtypes, as hidden states, rotary tables and
            position ids are. Broadcast axes may have stride 0.
        keep: As in `gather_tokens`.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        One tensor `[B, K, ...]` for each of `xs`, in order.

    Raises:
        ValueError, TypeError: As `gather_tokens`.
    """
    check_shape(keep=(keep, (None, None)))
    check_dtype(torch.int64, keep=keep)
    for x in xs:
        if x.dim() < 2 or x.shape[0] != keep.shape[0] or x.device != keep.device:
            raise ValueError(
                f"x {tuple(x.shape)} on {x.device} and keep {tuple(keep.shape)} on {keep.device} "
                "must share batch size and device, and x needs a token axis"
            )
        if x.is_complex():
            raise TypeError(f"x must be real, got {x.dtype}")
    if xs and resolve_backend(backend, keep, *xs) == "triton":
        from vispress_kernels.gather_tokens.kernel import gather_tokens_triton

        return gather_tokens_triton(xs, keep)
    return tuple([gather_tokens_reference(x, keep) for x in xs])
