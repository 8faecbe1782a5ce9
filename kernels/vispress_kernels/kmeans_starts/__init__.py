"""Starts of k-means by k-means++."""

import torch
from torch import Tensor

from vispress_kernels._backend import Backend, resolve_backend
from vispress_kernels._checks import check_device, check_dtype, check_floating, check_shape
from vispress_kernels.kmeans_starts.reference import kmeans_starts_reference
from vispress_kernels.products import holds

__all__ = ["kmeans_starts", "kmeans_starts_reference"]


def kmeans_starts(x: Tensor, drawn: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Draw tokens one by one in proportion to the squared distance to those drawn before.

    Distances are `1 - cosine`, at least 0; the first token is uniform. Up to 4,096 tokens, unless
    few are drawn, their cosines are held, and the kernel takes all steps in one launch, a program a
    sample. Beyond, memory is O(N D) and each step reads the tokens once, in plain torch. Without a
    host sync; not differentiable.

    Args:
        x: Tokens `[B, N, D]`, N at least 1, fp16, bf16, fp32 or fp64, any strides; distances are in
            fp32.
        drawn: A number in `[0, 1)` for each of K steps, `[K]` fp64: where in the sum of squared
            distances its token lies. The same for every sample.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        Indices `[B, K]` int64, in the order drawn; a token is drawn again only where all distances
        are 0.

    Raises:
        ValueError: Shapes or devices disagree.
        TypeError: `x` is not floating, or `drawn` is not fp64.
    """
    check_shape(x=(x, (None, None, None)), drawn=(drawn, (None,)))
    check_floating(x=x)
    check_dtype(torch.float64, drawn=drawn)
    check_device(x=x, drawn=drawn)
    x, (B, N, D), K = x.detach(), x.shape, len(drawn)
    chosen = resolve_backend(backend, x)
    if B == 0 or K == 0:
        return torch.empty(B, K, dtype=torch.int64, device=x.device)
    if N == 0:
        raise ValueError(f"x must have tokens to draw {K} of, got shape {tuple(x.shape)}")
    if chosen == "triton":
        from vispress_kernels.kmeans_starts.kernel import MOST, kmeans_starts_triton

        if N <= MOST and holds(N, D, K):
            return kmeans_starts_triton(x, drawn)
    return kmeans_starts_reference(x, drawn)
