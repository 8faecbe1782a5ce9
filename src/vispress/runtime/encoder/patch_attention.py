"""How much attention a patch gets from the other patches: without its own row and [CLS]'s."""

import torch
from torch import Tensor

from vispress.methods.base import upcast
from vispress_kernels import Backend
from vispress_kernels.column_attention import column_attention
from vispress_kernels.query_attention import query_attention

ROWS = 256
"""Query rows whose logits are held at a time."""


def patch_attention(
    query: Tensor,
    key: Tensor,
    scale: float,
    bounds: Tensor | None,
    ahead: int,
    backend: Backend,
) -> Tensor:
    """`[B, H, N]` fp32: mean over the other patches, of a softmax over all keys.

    Args:
        query: `[B, H, S, Dh]`, [CLS] first where there is one.
        key: The same.
        scale: Of the logits.
        bounds: Cumulative lengths of packed images or windows; None for one a row of the batch.
        ahead: Tokens in front of the patches: 1 for [CLS], or 0.
        backend: Kernels to use.
    """
    mean = column_attention(query, key, cu_seqlens=bounds, scale=scale, backend=backend)
    S = query.shape[2]
    rows = torch.full((S,), S, device=query.device)
    segment = torch.zeros(S, dtype=torch.int64, device=query.device)
    if bounds is not None:
        places = torch.arange(S, device=query.device)
        segment = torch.searchsorted(bounds.long()[1:-1], places, right=True)
        rows = (bounds[1:] - bounds[:-1])[segment]
    total = upcast(mean) * rows - own_attention(query, key, segment, scale)
    others = rows - 1
    if ahead:
        first = query_attention(query[:, :, :1], key, scale=scale, backend=backend)
        total, others = (total - upcast(first)[:, :, 0])[:, :, 1:], others[1:] - 1
    return total.clamp(min=0) / others.clamp(min=1)


def own_attention(query: Tensor, key: Tensor, segment: Tensor, scale: float) -> Tensor:
    """`[B, H, S]`: attention of each row to itself, a block of rows at a time."""
    query, key = upcast(query), upcast(key)
    own = (query * key).sum(dim=-1) * scale
    totals = []
    blocks = zip(torch.split(query, ROWS, dim=2), torch.split(segment, ROWS), strict=True)
    for part, places in blocks:
        logits = part @ key.mT * scale
        apart = places[:, None] != segment
        totals.append(logits.masked_fill_(apart, float("-inf")).logsumexp(dim=-1))
    return (own - torch.cat(totals, dim=2)).exp()
