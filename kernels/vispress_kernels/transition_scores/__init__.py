"""How far a module moved each token: magnitude and direction of its output against its input."""

from torch import Tensor

from vispress_kernels._backend import Backend, resolve_backend
from vispress_kernels._checks import check_device, check_dtype, check_floating, check_shape
from vispress_kernels.transition_scores.reference import transition_scores_reference

__all__ = ["transition_scores", "transition_scores_reference"]


def transition_scores(x: Tensor, y: Tensor, *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """Ratio of norms `|y| / |x|` and cosine of every token, in one pass over both tensors.

    Norms below 1e-8 count as 1e-8 where they divide. Bound by memory: each element is read once.
    The kernel has no backward (`"auto"` runs the reference where one is needed).

    Args:
        x: Module inputs `[..., D]`, fp16, bf16, fp32 or fp64, any strides (a copy is made for
            strided tensors that have other than three axes).
        y: Module outputs, with the shape and dtype of `x`.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        Magnitude and cosine, each `[...]` in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: `x` and `y` disagree in shape or device, or have no axes.
        TypeError: They are not of one floating dtype.
    """
    if x.dim() == 0:
        raise ValueError("x must have at least one axis, got a scalar")
    check_shape(y=(y, tuple(x.shape)))
    check_floating(x=x)
    check_dtype(x.dtype, y=y)
    check_device(x=x, y=y)
    if resolve_backend(backend, x, y, has_backward=False) == "torch":
        return transition_scores_reference(x, y)
    from vispress_kernels.transition_scores.kernel import transition_scores_triton

    return transition_scores_triton(x, y)
