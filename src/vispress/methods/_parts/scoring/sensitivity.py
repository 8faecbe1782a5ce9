"""How far a projector's output moves when its input is nudged along given directions."""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vispress.methods._parts.scoring.normed_mlp import changes_of_normed_mlp
from vispress.methods.base import upcast
from vispress.types import VisualTokens
from vispress_kernels.perturbation_scores import perturbation_scores

Average = Literal["mean", "rms"]


def of_any_projector(
    x: Float[Tensor, "B N Dv"],
    projector: Callable[[Tensor], Tensor],
    directions: Float[Tensor, "m Dv"],
    h: float,
    average: Average = "mean",
) -> Float[Tensor, "B N"]:
    """Average over directions u of `|P(x + h u) - P(x - h u)| / (2 h)`: 2 m calls of P.

    Args:
        x: Projector inputs in the precision to compute in.
        projector: P; must keep that precision.
        directions: Unit vectors.
        h: Step.
        average: Mean, or root of the mean of squares.
    """
    total = torch.zeros_like(x[..., 0])
    for u in directions.to(x):
        moved = (projector(x + h * u) - projector(x - h * u)).norm(dim=-1)
        total = total + (moved if average == "mean" else moved.square())
    if average == "mean":
        return total / (2 * h * len(directions))
    return (total / len(directions)).sqrt() / (2 * h)


def sensitivity(
    tokens: VisualTokens, directions: Float[Tensor, "m Dv"], h: float, average: Average
) -> Float[Tensor, "B N"]:
    """Average for a bucket, in at least fp32; a two-layer MLP shares work between directions.

    With an MLP in fp16 or bf16 its second product takes changes rounded to that dtype: a difference
    rounded after it was taken, whose relative error (2^-9 for bf16) averages out over hidden units.
    Behind a norm the MLP has no cheaper `"rms"`, nor a kernel.

    Args:
        tokens: With vision features and projector.
        directions: Unit vectors.
        h: Step.
        average: `"mean"` or `"rms"`.
    """
    assert tokens.vision_features is not None
    assert tokens.projector is not None
    x, mlp = tokens.vision_features, tokens.two_layer
    directions = directions.to(upcast(x[:0]))
    if mlp is None:
        return of_any_projector(upcast(x), tokens.projector, directions, h, average)
    if mlp.norm is not None:
        changes = changes_of_normed_mlp(x.flatten(0, 1), mlp, directions, h).view(*x.shape[:2], -1)
        mean = changes.mean(dim=2) if average == "mean" else changes.square().mean(dim=2).sqrt()
        return mean / (2 * h)
    return perturbation_scores(
        x,  # as it is: half types meet W1 on the tensor cores, without loss
        mlp.w1,
        mlp.b1,
        mlp.w2,
        directions,
        step=h,
        activation=mlp.activation,
        average=average,
        backend=tokens.backend,
    )
