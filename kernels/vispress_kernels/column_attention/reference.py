"""What `column_attention` means, in plain torch, a block of query rows at a time."""

from functools import reduce
from itertools import pairwise

import torch
from torch import Tensor


def segment_bounds(cu_seqlens: Tensor, S: int) -> Tensor:
    """First position and end of each position's segment, `[2, S]` int64, without a sync."""
    places = torch.arange(S, device=cu_seqlens.device)
    ends = cu_seqlens.to(torch.int64)
    # without the outer two: every position has a segment
    segment = torch.searchsorted(ends[1:-1], places, right=True)
    return ends.unfold(0, 2, 1).T[:, segment].contiguous()


def query_counts(bounds: Tensor | None, valid: Tensor | None, q: Tensor) -> Tensor:
    """Valid queries in each key's segment, `[B, S]` int64, for queries `[B, H, S, Dh]`."""
    B, S = q.shape[0], q.shape[2]
    if valid is None and bounds is None:
        return torch.full((), S, dtype=torch.int64, device=q.device).expand(B, S)
    if valid is None:
        assert bounds is not None
        return (bounds[1] - bounds[0]).expand(B, S)
    before = torch.nn.functional.pad(valid.to(torch.int64).cumsum(1), (1, 0))  # [B, S + 1]
    if bounds is None:
        return before[:, -1:].expand(B, S)
    return before[:, bounds[1]] - before[:, bounds[0]]


def column_attention_reference(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor | None,
    valid: Tensor | None,
    scale: float,
    causal: bool,
) -> Tensor:
    """Mean over valid queries of the softmax of `scale * q k^T`; differentiable.

    Packed segments are taken one by one (their bounds are read on the host). A block of rows has at
    most as many scores as the keys have elements.
    """
    if cu_seqlens is not None:
        bounds, S = cu_seqlens.tolist(), q.shape[2]
        if bounds[0] != 0 or bounds[-1] != S or sorted(bounds) != bounds:
            raise ValueError(f"cu_seqlens must run from 0 to {S} without a step back, got {bounds}")
        parts = [
            column_attention_reference(
                q[:, :, a:b],
                k[:, :, a:b],
                None,
                None if valid is None else valid[:, a:b],
                scale,
                causal,
            )
            for a, b in pairwise(bounds)
        ]
        return torch.cat(parts, -1)
    B, H, S, Dh = q.shape
    Hk = k.shape[1]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys = k.to(dtype)[:, :, None].transpose(-1, -2)  # [B, Hk, 1, Dh, S]
    total = torch.zeros(B, H, S, dtype=dtype, device=q.device)
    places = torch.arange(S, device=q.device)
    step = max(1, min(S, Dh * Hk // max(H, 1)))
    for begin in range(0, S, step):
        here = places[begin : begin + step]
        queries = torch.unflatten(q[:, :, begin : begin + step].to(dtype), 1, (Hk, H // Hk))
        logits = (queries @ keys).flatten(1, 2) * scale  # [B, H, step, S]
        masks = []
        if causal:
            masks.append(places <= here[:, None])
        if valid is not None:
            masks.append(valid[:, None, None, :] & valid[:, None, here, None])
        if masks:
            allowed = reduce(torch.logical_and, masks)
            logits = logits.masked_fill(~allowed, float("-inf"))
        weights = logits.softmax(-1)
        if masks:  # a query without keys has no distribution
            weights = weights.masked_fill(~allowed.any(-1, keepdim=True), 0.0)
        total = total + weights.sum(-2)
    counts = query_counts(None, valid, q).to(total)
    return total / counts.clamp(min=1)[:, None]
