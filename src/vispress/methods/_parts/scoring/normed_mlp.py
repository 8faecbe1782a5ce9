"""How far a two-layer MLP behind a norm moves when its input is nudged: a merger's sensitivity."""

import torch
from jaxtyping import Float
from torch import Tensor

from vispress.projectors import TwoLayer
from vispress_kernels.perturbation_scores.reference import HALVES, approximation, product

ON_HOST, ON_DEVICE = 1 << 20, 1 << 25
"""Hidden units that exist at a time: on the host those that fit its caches."""


@torch.no_grad()
def changes_of_normed_mlp(
    x: Float[Tensor, "n Dv"], mlp: TwoLayer, directions: Float[Tensor, "m Dv"], h: float
) -> Float[Tensor, "n m"]:
    """Compute `|P(x + h u) - P(x - h u)|` of a P that norms patches first; no gradients.

    Centred at the mean of each patch (for an RMS norm: as it is), a patch `x_j + h u_j` is normed
    by a factor r alone, which takes the squares and the product of `x_j` and `u_j`. The hidden
    units are then sums over patches of `r (W_j x_j + h W_j u_j)`, whose products all passes share;
    the change is taken before the second product, which is linear, and rounded to W2's dtype where
    that is fp16 or bf16 and the rest fp32. Nothing of size `n x m x Dh` is stored.

    Args:
        x: Token inputs, of any dtype.
        mlp: With a norm.
        directions: In the precision to compute in, fp32 or fp64.
        h: Step.
    """
    assert mlp.norm is not None
    dtype, norm, hidden = directions.dtype, mlp.norm, len(mlp.w1)
    first = torch.unflatten(mlp.w1.to(dtype), 1, (norm.patches, -1))  # [Dh, P, Dv / P]
    bias = first.new_zeros(hidden) if mlp.b1 is None else mlp.b1.to(dtype)
    if norm.bias is not None:
        bias = bias + first.sum(dim=1) @ norm.bias.to(dtype)
    first = (first * norm.weight.to(dtype)).permute(1, 2, 0)
    u = norm.centre(directions)
    moves = h * (u @ first).transpose(0, 1)  # [m, P, Dh]
    at_a_time = ON_DEVICE if x.is_cuda else ON_HOST
    changes = []
    for part in torch.split(x, max(1, at_a_time // ((norm.patches + 1) * hidden))):
        own = norm.centre(part.to(dtype))
        shared = torch.cat([own @ first, bias.expand(1, len(part), -1)]).transpose(0, 1)
        rates = _norm_factors(own, u, norm.eps, h)
        width = max(1, at_a_time // (2 * len(part) * hidden))
        changes.append(_changes(shared.contiguous(), rates, moves, mlp, width))
    return torch.cat(changes)


def _norm_factors(own: Tensor, u: Tensor, eps: float, h: float) -> Tensor:
    """Compute the factors `[n, m, 2, P + 1]` by which both passes norm patches; 1 for the bias.

    Args:
        own: Centred patches `[P, n, d]`.
        u: Centred directions `[P, m, d]`.
        eps: The norm's.
        h: Step.
    """
    cross = own @ u.mT * (2 * h / own.shape[2])
    square = own.square().mean(2)[:, :, None] + h**2 * u.square().mean(2)[:, None]
    both = torch.stack([square + cross, square - cross], dim=-1).clamp_(min=0).add_(eps).rsqrt_()
    return torch.cat([both, torch.ones_like(both[:1])]).permute(1, 2, 3, 0).contiguous()


def _changes(shared: Tensor, rates: Tensor, moves: Tensor, mlp: TwoLayer, width: int) -> Tensor:
    """Compute the changes `[n, m]`, `width` directions at a time.

    Args:
        shared: `[n, P + 1, Dh]`; the patches' hidden units before the norm, and the bias.
        rates: As `_norm_factors` gives them.
        moves: `[m, P, Dh]`; those of the directions, times the step.
        mlp: Its second layer and activation are used.
        width: Directions at a time.
    """
    count, dtype, approximate = len(shared), shared.dtype, approximation(mlp.activation)
    rounded = mlp.w2.dtype if mlp.w2.dtype in HALVES and dtype == torch.float32 else dtype
    second = mlp.w2.to(rounded if shared.is_cuda else dtype).mT
    signed = torch.stack([moves, -moves], dim=1)
    changes = []
    for i in range(0, len(moves), width):
        rate, sign = rates[:, i : i + width], signed[i : i + width].flatten(0, 1)
        both = rate.flatten(1, 2)
        units = torch.bmm(both, shared)
        units.transpose(0, 1).baddbmm_(both[..., :-1].transpose(0, 1), sign)
        units = torch.ops.aten.gelu_(units, approximate=approximate)
        change = units[:, 0::2], units[:, 1::2]
        scale = _scales(rate, moves[i : i + width]) if rounded == torch.float16 else None
        if scale is None:  # rounded while it is taken
            taken = torch.sub(*change, out=units.new_empty(change[0].shape, dtype=rounded))
        else:
            taken = (change[0] - change[1]).div_(scale).to(rounded)
        norm = torch.linalg.vector_norm(product(taken.flatten(0, 1), second, dtype), dim=1)
        norm = norm.view(count, -1)
        changes.append(norm if scale is None else norm.mul_(scale[..., 0]))
    return torch.cat(changes, dim=1)


def _scales(rate: Tensor, moves: Tensor) -> Tensor:
    """Choose powers of two `[n, c, 1]`, over which changes are small numbers that fp16 holds.

    Args:
        rate: `[n, c, 2, P + 1]`.
        moves: `[c, P, Dh]`.
    """
    lengths = torch.linalg.vector_norm(moves, dim=2)
    _, exponent = torch.frexp((rate[:, :, 0, :-1] * lengths).sum(dim=2, keepdim=True))
    return torch.ldexp(rate.new_ones(exponent.shape), exponent)
