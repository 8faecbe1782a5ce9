"""Greedy MAP selection under a determinantal point process conditioned on relevance."""

import torch
from torch import Tensor

from vispress_kernels._backend import Backend, resolve_backend
from vispress_kernels._checks import check_count, check_device, check_floating, check_shape
from vispress_kernels.dpp_select.reference import dpp_select_reference

__all__ = ["dpp_select", "dpp_select_reference"]


def dpp_select(x: Tensor, relevance: Tensor, num_keep: int, *, backend: Backend = "auto") -> Tensor:
    """Choose tokens one by one, each adding most to the determinant of the chosen ones' kernel.

    The kernel is `L = diag(r) cos(x, x) diag(r)`. Ties go to the lowest index; no token is chosen
    twice. Once nothing is left to gain (the largest gain is within rounding of 0, as when K exceeds
    the rank), the rest is chosen by relevance. Memory is O(N (D + min(K, D))): each step computes a
    row of `L`. The reference holds all of `L` up to 4,096 tokens, or as many as they are wide,
    unless few are chosen. Bound by memory or cache; the kernel takes one launch, or one a step,
    without a host sync. Not differentiable.

    Args:
        x: Tokens `[B, N, D]`, fp16, bf16, fp32 or fp64, any strides; the factor is in fp32.
        relevance: r `[B, N]`, floating, at least 0; NaN counts as 0.
        num_keep: Tokens to choose (K), in `[0, N]`.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        Indices `[B, K]` int64, in the order chosen (sort them for `keep`).

    Raises:
        ValueError: Shapes or devices disagree, or `num_keep` is out of range.
        TypeError: A tensor is not floating.
    """
    check_shape(x=(x, (None, None, None)))
    B, N, _ = x.shape
    check_shape(relevance=(relevance, (B, N)))
    check_count("num_keep", num_keep, 0, N)
    check_floating(x=x, relevance=relevance)
    check_device(x=x, relevance=relevance)
    x, relevance = x.detach(), relevance.detach()
    chosen = resolve_backend(backend, x)
    if B == 0 or num_keep == 0:
        return torch.empty(B, num_keep, dtype=torch.int64, device=x.device)
    if chosen == "torch":
        return dpp_select_reference(x, relevance, num_keep)
    from vispress_kernels.dpp_select.kernel import dpp_select_triton

    return dpp_select_triton(x, relevance, num_keep)
