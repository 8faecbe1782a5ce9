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


def first_equal(rows: Tensor, block: int | None = None) -> Tensor:
    """Index of the first row equal to each row of `[B, N, D]`, itself where there is none.

    A matrix product may round equal rows differently by their place; read through this index,
    equal rows have equal products.

    Args:
        rows: Any values, N at least 1; a NaN or an infinity equals nothing.
        block: Rows compared at a time; left out, what a CPU's cache holds, or 1,024 on a GPU.
    """
    B, N, D = rows.shape
    if block is None:
        block = 1024 if rows.is_cuda else max(16, (1 << 18) // max(1, D))
    # summed token by token, so that equal rows have equal sums and stand side by side once sorted;
    # sines of whole numbers have no whole combination that is 0, so that rows of few values differ
    mix = torch.arange(1, D + 1, device=rows.device).sin().to(rows.dtype)
    parts = [(rows[:, i : i + block] * mix).sum(-1) for i in range(0, N, block)]
    order = torch.cat(parts, 1).sort(dim=1, stable=True).indices
    flat = rows.reshape(B * N, D)
    places = torch.arange(N, device=rows.device)
    base = torch.arange(B, device=rows.device)[:, None] * N
    fresh = torch.ones(B, N, dtype=torch.bool, device=rows.device)
    for i in range(1, N, block):
        here = order[:, i - 1 : i + block] + base
        values = flat.index_select(0, here.flatten()).view(*here.shape, D)
        # differences, as comparing all numbers takes thrice as long
        apart = (values[:, 1:] - values[:, :-1]).abs_().sum(-1)
        fresh[:, i : i + block] = apart != 0
    leader = torch.where(fresh, places, 0).cummax(1).values  # where each run of equals starts
    return torch.empty_like(order).scatter(1, order, order.gather(1, leader))


def assign_nearest_reference(
    x: Tensor, targets: Tensor, exclude_self: bool
) -> tuple[Tensor, Tensor]:
    """Index and cosine of each row's nearest target; ties and NaN as the public face says.

    A block of rows has at most as many cosines as the targets have elements.
    """
    B, N, D = x.shape
    M = targets.shape[1]
    rows, units = unit_rows(x), unit_rows(targets)
    columns, twin = units.transpose(1, 2), first_equal(units)[:, None]
    index = torch.empty(B, N, dtype=torch.int64, device=x.device)
    cosine = rows.new_empty(B, N)
    places = torch.arange(M, device=x.device)
    for begin in range(0, N, max(D, 1)):
        part = slice(begin, begin + max(D, 1))
        similarity = (rows[:, part] @ columns).nan_to_num(nan=float("-inf"))
        similarity = similarity.gather(2, twin.expand_as(similarity))
        if exclude_self:
            itself = places == torch.arange(N, device=x.device)[part, None]
            similarity = similarity.masked_fill(itself, float("-inf"))
        best = similarity.argmax(-1)  # the first of equals
        index[:, part] = best
        cosine[:, part] = similarity.gather(-1, best[..., None])[..., 0]
    return index, cosine
