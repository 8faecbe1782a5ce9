"""How much attention each token receives, without the attention map."""

import torch
from torch import Tensor

from vispress_kernels._backend import Backend, resolve_backend
from vispress_kernels._checks import (
    check_device,
    check_dtype,
    check_floating,
    check_heads,
    check_shape,
)
from vispress_kernels.column_attention.reference import column_attention_reference, segment_bounds

MAX_HEAD = 256  # wider ones do not fit shared memory

__all__ = ["column_attention", "column_attention_reference"]


def column_attention(
    q: Tensor,
    k: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    valid: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    mean_heads: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Mean over all queries of the softmax weights each key receives, in fp32.

    Bound by the tensor cores: q k^T is computed twice (each row's log-sum-exp, then each column)
    and no S x S map is stored. Heads wider than 256 run the reference. The kernel has no backward
    (`"auto"` runs the reference where one is needed).

    Args:
        q: Queries `[B, H, S, Dh]` as the layer uses them, fp16, bf16, fp32 or fp64, any strides.
        k: Keys `[B, Hk, S, Dh]` of the same dtype; Hk divides H.
        cu_seqlens: Bounds `[M + 1]` int32 or int64, from 0 to S, of segments packed along S, which
            attend only inside themselves. The mean is then over the key's own segment. The
            reference reads them on the host and refuses bounds that do not run from 0 to S; the
            kernel does not look (it would cost a device synchronisation).
        valid: `[B, S]` bool, False on padding, which counts neither as key nor as query.
        causal: Whether a query sees only keys up to its own place.
        scale: Factor on the logits; `Dh ** -0.5` when left out.
        mean_heads: Average over heads too.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        `[B, H, S]`, or `[B, S]` with `mean_heads`; fp32 (fp64 for fp64 inputs). Padding gets 0.

    Raises:
        ValueError: Shapes or devices disagree, Hk does not divide H, Dh is 0, or the reference
            reads bounds that do not run from 0 to S.
        TypeError: A dtype is not one named above.
    """
    check_shape(q=(q, (None, None, None, None)))
    B, _H, S, Dh = q.shape
    check_shape(k=(k, (B, None, S, Dh)))
    check_heads(q, k)
    check_floating(q=q)
    check_dtype(q.dtype, k=k)
    check_device(q=q, k=k, cu_seqlens=cu_seqlens, valid=valid)
    if cu_seqlens is not None:
        check_shape(cu_seqlens=(cu_seqlens, (None,)))
        if len(cu_seqlens) < 2:
            raise ValueError(f"cu_seqlens must hold at least 0 and S, got {len(cu_seqlens)} bounds")
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if valid is not None:
        check_dtype(torch.bool, valid=valid)
        check_shape(valid=(valid, (B, S)))
    scale = Dh**-0.5 if scale is None else scale
    chosen = resolve_backend(backend, q, k, has_backward=False)
    if chosen == "torch" or Dh > MAX_HEAD:
        out = column_attention_reference(q, k, cu_seqlens, valid, scale, causal)
    else:
        from vispress_kernels.column_attention.kernel import column_attention_triton

        bounds = None if cu_seqlens is None else segment_bounds(cu_seqlens, S)
        out = column_attention_triton(q, k, bounds, valid, scale, causal)
    return out.mean(1) if mean_heads else out
