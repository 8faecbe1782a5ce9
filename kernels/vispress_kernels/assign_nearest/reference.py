"""What `assign_nearest` means, in plain torch, a block of rows at a time."""

import torch
from torch import Tensor

EPS = 1e-8


def unit_rows(x: Tensor) -> Tensor:
    """Rows over their norm (at least 1e-8), in fp32; fp64 stays fp64."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    return x.to(dtype) / norm.clamp(min=EPS)


def inverse_norms(x: Tensor) -> Tensor:
    """One over each row's norm (at least 1e-8), in fp32."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    return norm.clamp(min=EPS).reciprocal()


def assign_nearest_reference(
    x: Tensor, targets: Tensor, exclude_self: bool
) -> tuple[Tensor, Tensor]:
    """Index and cosine of each row's nearest target; ties and NaN as the public face says.

    A block of rows has at most as many cosines as the targets have elements.
    """
    B, N, D = x.shape
    M = targets.shape[1]
    rows, columns = unit_rows(x), unit_rows(targets).transpose(1, 2)
    index = torch.empty(B, N, dtype=torch.int64, device=x.device)
    cosine = rows.new_empty(B, N)
    places = torch.arange(M, device=x.device)
    for begin in range(0, N, max(D, 1)):
        part = slice(begin, begin + max(D, 1))
        similarity = (rows[:, part] @ columns).nan_to_num(nan=float("-inf"))
        if exclude_self:
            itself = places == torch.arange(N, device=x.device)[part, None]
            similarity = similarity.masked_fill(itself, float("-inf"))
        best = similarity.argmax(-1)  # the first of equals
        index[:, part] = best
        cosine[:, part] = similarity.gather(-1, best[..., None])[..., 0]
    return index, cosine
