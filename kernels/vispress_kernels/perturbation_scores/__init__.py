"""How much a two-layer projector's output moves when its input is nudged."""

from typing import get_args

from torch import Tensor

from vispress_kernels._backend import Backend, resolve_backend
from vispress_kernels._checks import check_device, check_floating, check_shape
from vispress_kernels.perturbation_scores.reference import (
    Activation,
    Average,
    first_products,
    perturbation_scores_reference,
    root_mean_square,
)

__all__ = ["perturbation_scores", "perturbation_scores_reference"]


def perturbation_scores(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    directions: Tensor,
    *,
    step: float = 0.01,
    activation: Activation = "gelu",
    average: Average = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """Zeroth-order sensitivity of `P(x) = W2 act(W1 x + b1) + b2` at each token.

    The score is the mean over directions u of `|P(x + step u) - P(x - step u)| / (2 step)`, in fp32
    whatever the dtype (in fp16 the step would drown). `W1 x` and `W1 u` are computed once, b2
    cancels, the difference is taken before the second product (one product a direction, not two),
    and nothing of size `m x N x D` is stored. Where W2 is fp16 or bf16 (and x not fp64), the
    difference is rounded to its dtype for the tensor cores, which sum in fp32; the rounding is
    relative to the difference, not to the activations it is taken from. Bound by the tensor cores:
    `2 m N Dh D` FLOPs. The kernel has no backward (`"auto"` then runs the reference).

    Args:
        x: Projector inputs `[B, N, Dv]`, fp16, bf16, fp32 or fp64.
        w1: First weight `[Dh, Dv]`, as `nn.Linear` has it.
        b1: First bias `[Dh]`, or None.
        w2: Second weight `[D, Dh]`. For `W2 = U S V^T` with orthonormal U, `S V^T` gives the same
            scores: a truncated factor `[rank, Dh]` is the cheap form.
        directions: `[m, Dv]`, the same for every token, m at least 1; used as given.
        step: Length of the nudge in units of the directions, above 0.
        activation: `"gelu"` (exact) or `"gelu_tanh"`.
        average: `"mean"` of the norms; or `"rms"`, the root of the mean of their squares in the
            limit of a small step, which takes one product for all directions: `2 Dh^2 (N + D + m)`
            FLOPs, about m times fewer, as plain torch with either backend.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        `[B, N]` fp32 (fp64 for fp64 `x`).

    Raises:
        ValueError: Shapes or devices disagree, or an option is out of range.
        TypeError: A tensor is not floating.
    """
    check_shape(x=(x, (None, None, None)))
    check_shape(w1=(w1, (None, x.shape[2])))
    check_shape(b1=(b1, (w1.shape[0],)), w2=(w2, (None, w1.shape[0])))
    check_shape(directions=(directions, (None, x.shape[2])))
    check_floating(x=x, w1=w1, b1=b1, w2=w2, directions=directions)
    check_device(x=x, w1=w1, b1=b1, w2=w2, directions=directions)
    if directions.shape[0] == 0:
        raise ValueError(f"directions must not be empty, got shape {tuple(directions.shape)}")
    if not step > 0:
        raise ValueError(f"step must be above 0, got {step}")
    if activation not in get_args(Activation):
        raise ValueError(f"activation must be one of {get_args(Activation)}, got {activation!r}")
    if average not in get_args(Average):
        raise ValueError(f"average must be one of {get_args(Average)}, got {average!r}")
    chosen = resolve_backend(backend, x, w1, b1, w2, directions, has_backward=average == "rms")
    hidden, moves = first_products(x, w1, b1, directions, step)
    if average == "rms":
        return root_mean_square(hidden, moves, w2, activation) / (2 * step)
    if chosen == "torch":
        return perturbation_scores_reference(hidden, moves, w2, activation) / (2 * step)
    from vispress_kernels.perturbation_scores.kernel import perturbation_scores_triton

    return perturbation_scores_triton(hidden, moves, w2, activation) / (2 * step)
