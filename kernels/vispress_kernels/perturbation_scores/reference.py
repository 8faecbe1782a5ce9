"""What `perturbation_scores` means, in plain torch, one direction at a time."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from vispress_kernels._backend import needs_grad

Activation = Literal["gelu", "gelu_tanh"]
Average = Literal["mean", "rms"]
HALVES = (torch.float16, torch.bfloat16)


def approximation(activation: Activation) -> str:
    """The name torch has for an activation."""
    return "tanh" if activation == "gelu_tanh" else "none"


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """`a @ b` of two matrices, summed and returned in `dtype`.

    Products of two bf16 or fp16 numbers are exact in fp32, so tensor cores take both as they are.
    """
    half = a.dtype == b.dtype and a.dtype in HALVES and dtype == torch.float32
    if half and a.is_cuda and not needs_grad(a, b):
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def first_products(
    x: Tensor, w1: Tensor, b1: Tensor | None, directions: Tensor, step: float
) -> tuple[Tensor, Tensor]:
    """`W1 x + b1` `[B, N, Dh]` and `step * W1 u` `[m, Dh]`, which all perturbed passes share."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    hidden = product(x.flatten(0, 1), w1.mT, dtype)
    if b1 is not None:
        hidden = hidden + b1.to(dtype) if needs_grad(hidden, b1) else hidden.add_(b1)
    return hidden.view(*x.shape[:2], len(w1)), step * product(directions, w1.mT, dtype)


def scales(moves: Tensor) -> Tensor:
    """Powers of two `[m]`, over which a move's changes are at most about 2, as fp16 wants them."""
    _, exponent = torch.frexp(torch.linalg.vector_norm(moves.detach(), dim=-1))
    return torch.ldexp(moves.new_ones(len(moves)), exponent)


def change_norms(
    hidden: Tensor,
    move: Tensor,
    scale: Tensor,
    w2: Tensor,
    dtype: torch.dtype,
    activation: Activation,
) -> Tensor:
    """`|W2 (act(hidden + move) - act(hidden - move))|` of one move; W2 as wide as `hidden`.

    The change is rounded to `dtype`, W2's own, where that is fp16 or bf16 and `hidden` fp32.
    """
    approximate = approximation(activation)
    change = gelu(hidden + move, approximate=approximate)
    change = change - gelu(hidden - move, approximate=approximate)
    if dtype in HALVES and hidden.dtype == torch.float32:
        exact = change.detach()
        nearest = (exact / scale).to(dtype).to(exact.dtype) * scale
        change = change + (nearest - exact)  # `nearest`, with the gradient of `change`
    norm: Tensor = torch.linalg.vector_norm(linear(change, w2), dim=-1)
    return norm


def perturbation_scores_reference(
    hidden: Tensor, moves: Tensor, w2: Tensor, activation: Activation
) -> Tensor:
    """Mean over moves of `|W2 (act(hidden + move) - act(hidden - move))|`; differentiable.

    The difference is taken before the second product, which is linear: one product a direction. It
    is rounded to W2's dtype where that is fp16 or bf16 and the rest fp32 (by a scale of the move's,
    so that fp16 holds it); the product is summed in fp32. Gradients pass the rounding as they are.
    """
    total, wide = hidden.new_zeros(hidden.shape[:-1]), w2.to(hidden.dtype)
    for move, scale in zip(moves.unbind(), scales(moves).unbind(), strict=True):
        total = total + change_norms(hidden, move, scale, wide, w2.dtype, activation)
    return total / len(moves)


def root_mean_square(hidden: Tensor, moves: Tensor, w2: Tensor, activation: Activation) -> Tensor:
    """Root over moves of the mean of `|W2 (act'(hidden) 2 move)|^2`, all moves in one product.

    With `g = act'(hidden)` and `G = W2^T W2`, a square is `g^T (G o move move^T) g`, in which the
    moves' mean can be taken first: `g^T (G o mean of move move^T) g`.
    """
    slope: Tensor = torch.ops.aten.gelu_backward(
        torch.ones_like(hidden), hidden, approximate=approximation(activation)
    )
    form = product(w2.mT, w2, hidden.dtype) * (moves.mT @ moves) * (4 / len(moves))
    squares = ((slope @ form) * slope).sum(-1)
    return squares.clamp(min=0).sqrt()
