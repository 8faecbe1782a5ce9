"""Attention for training: plain batched products that know how packed questions are laid out.

The masked SDPA kernel spends most of a step on pairs that packing forbids (5 times slower here).
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

FULL = "vispress_full"
PACKED = "vispress_packed"


def full_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[Tensor, None]:
    """Every token sees every token; (B, H, N, d) in, (B, N, H, d) out."""
    out = ((query * scaling) @ key.mT).softmax(-1) @ value
    return out.transpose(1, 2), None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal prefix; then slots of W tokens that see the prefix and, masked, themselves.

    Args:
        module: Unused.
        query: Shape (B, H, P + S * W, d), P >= 1 tokens of prefix.
        key: Likewise, or with fewer heads, each for equally many of the query's.
        value: See `key`.
        attention_mask: Additive mask within slots, shape (B, S, W, W).
        scaling: Factor on the scores.

    Returns:
        Shape (B, P + S * W, H, d), and None.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    query, key, value = (query * scaling).contiguous(), key.contiguous(), value.contiguous()
    slots, width = attention_mask.shape[1:3]
    size = query.shape[2] - slots * width
    prefix_key, prefix_value = key[:, :, :size], value[:, :, :size]
    causal = torch.full((size, size), -1e30, dtype=query.dtype, device=query.device).triu(1)
    prefix = (query[:, :, :size] @ prefix_key.mT + causal).softmax(-1) @ prefix_value

    text = query[:, :, size:]
    q, k, v = (torch.unflatten(x[:, :, size:], 2, (slots, width)) for x in (query, key, value))
    inside = (q @ k.mT + attention_mask[:, None]).flatten(2, 3)  # [B, H, S * W, W]
    scores = torch.cat([text @ prefix_key.mT, inside], dim=-1).softmax(-1)
    to_prefix, to_slot = torch.split(scores, [size, width], dim=-1)
    within = torch.unflatten(to_slot, 2, (slots, width)) @ v
    answer = to_prefix @ prefix_value + within.flatten(2, 3)
    return torch.cat([prefix, answer], dim=2).transpose(1, 2), None


AttentionInterface.register(FULL, full_attention)
AttentionInterface.register(PACKED, packed_attention)
