"""Greedy farthest-point selection on cosine distance."""

from typing import Literal

import torch
from torch import Tensor

from vispress_kernels._backend import Backend, resolve_backend
from vispress_kernels._checks import (
    check_count,
    check_device,
    check_dtype,
    check_floating,
    check_shape,
)
from vispress_kernels.assign_nearest import assign_nearest
from vispress_kernels.maxmin_select.reference import (
    first_of_best,
    maxmin_select_reference,
    most_isolated,
)

__all__ = ["maxmin_select", "maxmin_select_reference"]


def maxmin_select(
    x: Tensor,
    num_keep: int,
    *,
    weight: Tensor | None = None,
    first: Tensor | Literal["isolated", "weight"] | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Choose tokens one by one, each the farthest from those chosen before.

    The next token has the largest `weight * min over chosen of (1 - cosine)`, where distances
    within 8 units of rounding are 0 (copies of chosen tokens). Ties go to the lowest index, equal
    tokens tie, a NaN comes after all numbers, no token is chosen twice. Up to 4,096 tokens, unless
    few are chosen, their cosines are held: one product of all tokens (N^2 of them), and each of K
    steps reads a row, in one program a sample. Beyond, memory is O(N D), and each step reads the
    tokens once: bound by memory or cache, in one launch, or one a step. The reference holds cosines
    also of as many tokens as they are wide. Without a host sync; not differentiable.

    Args:
        x: Tokens `[B, N, D]`, fp16, bf16, fp32 or fp64, any strides; distances are in fp32.
        num_keep: Tokens to choose (K), in `[0, N]`.
        weight: Factor on each token's distance `[B, N]`, floating, at least 0.
        first: The first token: indices `[B]` int64; `"weight"`, the largest weight; or
            `"isolated"`, the token whose nearest other token is farthest (N^2 D work; distances
            within 8 units of rounding tie, as mutual neighbours do). Left out, it is `"weight"` if
            there is a weight, else `"isolated"`.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        Indices `[B, K]` int64, in the order chosen (sort them for `keep`).

    Raises:
        ValueError: Shapes or devices disagree, `num_keep` is out of range, or `first` asks for a
            weight that is not given.
        TypeError: `x` or `weight` is not floating, or `first` is not int64.
    """
    check_shape(x=(x, (None, None, None)))
    B, N, _ = x.shape
    check_count("num_keep", num_keep, 0, N)
    check_shape(weight=(weight, (B, N)))
    check_floating(x=x, weight=weight)
    check_device(x=x, weight=weight)
    x, weight = x.detach(), None if weight is None else weight.detach()
    chosen = resolve_backend(backend, x, weight)
    if first is None:
        first = "isolated" if weight is None else "weight"
    if isinstance(first, Tensor):
        check_shape(first=(first, (B,)))
        check_dtype(torch.int64, first=first)
        check_device(x=x, first=first)
    elif first not in ("isolated", "weight"):
        raise ValueError(f"first must be indices, 'isolated' or 'weight', got {first!r}")
    elif first == "weight" and weight is None:
        raise ValueError("first='weight' needs a weight, got None")
    if B == 0 or num_keep == 0:
        return torch.empty(B, num_keep, dtype=torch.int64, device=x.device)
    if first == "weight" and weight is not None:
        first = first_of_best(weight)
    given = first if isinstance(first, Tensor) else None
    if chosen == "torch":
        return maxmin_select_reference(x, num_keep, given, weight)
    from vispress_kernels.maxmin_select.kernel import maxmin_select_triton

    if given is None:
        given = most_isolated(assign_nearest(x, x, exclude_self=True, backend="triton")[1])
    return maxmin_select_triton(x, num_keep, given, weight)
