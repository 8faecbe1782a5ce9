"""Fold tokens into groups by weighted sum or mean."""

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
from vispress_kernels.merge_tokens.reference import group_weights, merge_tokens_reference

__all__ = ["merge_tokens", "merge_tokens_reference"]


def merge_tokens(
    x: Tensor,
    assign: Tensor,
    num_keep: int,
    *,
    weight: Tensor | None = None,
    reduce: Literal["sum", "mean"] = "sum",
    backend: Backend = "auto",
) -> Tensor:
    """Sum or average the tokens of each group: `out[b, k] = sum of weight * x where assign == k`.

    Accumulates in fp32, without float atomics: runs agree bit for bit. Differentiable in `x` and
    `weight` with either backend. Bound by memory: each token is read once.

    Args:
        x: Tokens `[B, N, D]`, fp16, bf16, fp32 or fp64, any strides.
        assign: Group of each token `[B, N]`, int64. Values outside `[0, num_keep)` belong to none.
        num_keep: Number of groups K, at least 0.
        weight: Weight of each token `[B, N]`, floating; 1 when left out.
        reduce: `"sum"`, or `"mean"` to divide by the group's total weight.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        A new contiguous tensor `[B, K, D]` with the dtype of `x`; groups without tokens (for
        `"mean"`: without weight) are zero.

    Raises:
        ValueError: Shapes or devices disagree, or `num_keep` or `reduce` is out of range.
        TypeError: `x` or `weight` is not floating, or `assign` is not int64.
    """
    check_shape(x=(x, (None, None, None)))
    check_shape(assign=(assign, tuple(x.shape[:2])), weight=(weight, tuple(x.shape[:2])))
    check_floating(x=x, weight=weight)
    check_dtype(torch.int64, assign=assign)
    check_device(x=x, assign=assign, weight=weight)
    check_count("num_keep", num_keep, 0, 2**31 - 1)
    if reduce not in ("sum", "mean"):
        raise ValueError(f"reduce must be 'sum' or 'mean', got {reduce!r}")
    if resolve_backend(backend, x, weight) == "torch":
        if reduce == "mean":
            weight = group_weights(assign, weight, num_keep)
        return merge_tokens_reference(x, assign, weight, num_keep)
    from vispress_kernels.merge_tokens.kernel import merge_tokens_triton

    return merge_tokens_triton(x, assign, weight, num_keep, reduce)
