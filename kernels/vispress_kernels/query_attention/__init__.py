"""Attention rows of a few queries, after the softmax, without the map."""

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
from vispress_kernels.query_attention.reference import query_attention_reference

MAX_HEAD = 256  # wider ones do not fit shared memory

__all__ = ["query_attention", "query_attention_reference"]


def query_attention(
    q: Tensor,
    k: Tensor,
    *,
    rows: Tensor | int | None = None,
    key_valid: Tensor | None = None,
    scale: float | None = None,
    mean_heads: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Softmax weights of a few queries over all keys, in fp32.

    Query i of sample b sees key j where `key_valid[b, j]` (or `key_valid[b, i, j]`) and, given
    `rows`, `j <= rows[b, i]`.
    A query that sees no key gets zeros. Bound by memory: each key is read once; long key axes are
    split over programs. Heads wider than 256 run the reference. The kernel has no backward
    (`"auto"` runs the reference where one is needed).

    Args:
        q: Queries `[B, H, Q, Dh]` as the layer uses them (rotated), fp16, bf16, fp32 or fp64, any
            strides. Q is meant to be small: the result has H * Q * N elements a sample.
        k: Keys `[B, Hk, N, Dh]` of the same dtype; query heads `g * Hk // H` share a key head, in
            order, so Hk divides H.
        rows: Place of each query among the keys, for the causal mask: `[B, Q]` or `[Q]` int64, or
            an int for queries at places `rows, rows + 1, ...`. None: every valid key is seen.
        key_valid: `[B, N]` bool, False on padding; or `[B, Q, N]`, any mask, one row a query.
        scale: Factor on the logits; `Dh ** -0.5` when left out.
        mean_heads: Average over heads, without storing them for more queries than fit in the
            memory of `k`.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        `[B, H, Q, N]`, or `[B, Q, N]` with `mean_heads`; fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: Shapes or devices disagree, Hk does not divide H, or Dh is 0.
        TypeError: `q` and `k` are not of one floating dtype, `rows` is neither int64 nor an int,
            or `key_valid` is not bool.
    """
    check_shape(q=(q, (None, None, None, None)))
    B, _H, Q, Dh = q.shape
    check_shape(k=(k, (B, None, None, Dh)))
    N = k.shape[2]
    check_heads(q, k)
    check_floating(q=q)
    check_dtype(q.dtype, k=k)
    if isinstance(rows, int):
        rows = torch.arange(rows, rows + Q, device=q.device)
    if rows is not None:
        if not isinstance(rows, Tensor):
            raise TypeError(f"rows must be an int64 tensor, an int or None, got {rows!r}")
        check_dtype(torch.int64, rows=rows)
        check_shape(rows=(rows, (B, Q) if rows.dim() == 2 else (Q,)))
        rows = rows.expand(B, Q)
    if key_valid is not None:
        check_dtype(torch.bool, key_valid=key_valid)
        check_shape(key_valid=(key_valid, (B, N) if key_valid.dim() == 2 else (B, Q, N)))
    check_device(q=q, k=k, rows=rows, key_valid=key_valid)
    scale = Dh**-0.5 if scale is None else scale
    chosen = resolve_backend(backend, q, k, has_backward=False)
    if chosen == "torch" or Dh > MAX_HEAD:
        return query_attention_reference(q, k, rows, key_valid, scale, mean_heads)
    from vispress_kernels.query_attention.kernel import query_attention_triton

    return query_attention_triton(q, k, rows, key_valid, scale, mean_heads)
