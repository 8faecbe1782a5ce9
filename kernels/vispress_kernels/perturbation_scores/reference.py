"""What `perturbation_scores` means, in plain torch, one direction at a time."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

Activation = Literal["gelu", "gelu_tanh"]
Average = Literal["mean", "rms"]


def approximation(activation: Activation) -> str:
    """The name torch has for an activation."""
    return "tanh" if activation == "gelu_tanh" else "none"


def first_products(
    x: Tensor, w1: Tensor, b1: Tensor | None, directions: Tensor, step: float
) -> tuple[Tensor, Tensor]:
    """`W1 x + b1` `[B, N, Dh]` and `step * W1 u` `[m, Dh]`, which all perturbed passes share."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    w1 = w1.to(dtype)
    hidden = linear(x.to(dtype), w1, None if b1 is None else b1.to(dtype))
    return hidden, step * linear(directions.to(dtype), w1)


def perturbation_scores_reference(
    hidden: Tensor, moves: Tensor, w2: Tensor, activation: Activation
) -> Tensor:
    """Mean over moves of `|W2 (act(hidden + move) - act(hidden - move))|`; differentiable.

    The difference is taken before the second product, which is linear: one product a direction.
    """
    approximate = approximation(activation)
    w2 = w2.to(hidden.dtype)
    total = hidden.new_zeros(hidden.shape[:-1])
    for move in moves.unbind():
        change = gelu(hidden + move, approximate=approximate)
        change = change - gelu(hidden - move, approximate=approximate)
        total = total + torch.linalg.vector_norm(linear(change, w2), dim=-1)
    return total / len(moves)


def root_mean_square(hidden: Tensor, moves: Tensor, w2: Tensor, activation: Activation) -> Tensor:
    """Root over moves of the mean of `|W2 (act'(hidden) 2 move)|^2`, all moves in one product.

    With `g = act'(hidden)` and `G = W2^T W2`, a square is `g^T (G o move move^T) g`, in which the
    moves' mean can be taken first: `g^T (G o mean of move move^T) g`.
    """
    slope: Tensor = torch.ops.aten.gelu_backward(
        torch.ones_like(hidden), hidden, approximate=approximation(activation)
    )
    w2 = w2.to(hidden.dtype)
    form = (w2.mT @ w2) * (moves.mT @ moves) * (4 / len(moves))
    squares = ((slope @ form) * slope).sum(-1)
    return squares.clamp(min=0).sqrt()
