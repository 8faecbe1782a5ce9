"""What `query_attention` means, in plain torch."""

import torch
from torch import Tensor

from vispress_kernels._launch import ceil_div


def query_chunk(q: Tensor, k: Tensor) -> int:
    """Queries at a time, such that their `[B, H, chunk, N]` fp32 scores are no larger than k."""
    one_query = max(1, q.shape[0] * q.shape[1] * k.shape[2] * 4)
    return max(1, min(q.shape[2], k.numel() * k.element_size() // one_query))


def query_attention_reference(
    q: Tensor,
    k: Tensor,
    rows: Tensor | None,
    valid: Tensor | None,
    scale: float,
    mean_heads: bool,
) -> Tensor:
    """Softmax of `scale * q k^T` over the allowed keys; differentiable."""
    B, H, Q, _ = q.shape
    Hk, N = k.shape[1:3]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys = k.to(dtype)[:, :, None]  # [B, Hk, 1, N, D]
    size = query_chunk(q, k) if mean_heads else max(Q, 1)
    chunks = []
    for i in range(ceil_div(Q, size)):
        part = slice(i * size, (i + 1) * size)
        queries = torch.unflatten(q[:, :, part].to(dtype), 1, (Hk, H // Hk))
        logits = (queries @ keys.transpose(-1, -2)).flatten(1, 2) * scale  # [B, H, q, N]
        own = valid if valid is None or valid.dim() == 2 else valid[:, part]
        allowed = _allowed(None if rows is None else rows[:, part], own, N)
        if allowed is not None:
            logits = logits.masked_fill(~allowed, float("-inf"))
        weights = logits.softmax(-1)
        if allowed is not None:  # a query without keys has no distribution
            weights = weights.masked_fill(~allowed.any(-1, keepdim=True), 0.0)
        chunks.append(weights.mean(1) if mean_heads else weights)
    if chunks:
        return torch.cat(chunks, dim=-2)
    return q.new_zeros((B, Q, N) if mean_heads else (B, H, Q, N), dtype=dtype)


def _allowed(rows: Tensor | None, valid: Tensor | None, N: int) -> Tensor | None:
    """Which keys a query may see, `[B, 1, Q or 1, N]`; None for all."""
    allowed = None
    if rows is not None:
        allowed = torch.arange(N, device=rows.device) <= rows[:, None, :, None]
    if valid is not None:
        valid = valid[:, None, None, :] if valid.dim() == 2 else valid[:, None]
        allowed = valid if allowed is None else allowed & valid
    return allowed
