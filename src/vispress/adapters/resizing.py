"""Smaller pictures for families whose encoder takes pixels on one grid."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def shorten_runs(
    inputs: Mapping[str, Any], placeholder: int, before: int, after: int, pad: int
) -> dict[str, Tensor]:
    """Shorten the placeholders of every picture, and pad on the left again.

    Args:
        inputs: A batch; whatever has the shape `[B, L]` of its `input_ids` is shortened with them.
        placeholder: Token id of a visual token.
        before: Visual tokens of a picture, the same for all.
        after: Those that stay, the first ones.
        pad: Token id of padding.

    Returns:
        The shortened tensors `[B, L']`, an `attention_mask` among them.
    """
    ids = inputs["input_ids"]
    valid = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    visual = valid & (ids == placeholder)
    # the n-th placeholder of a picture stays if it is one of its first `after`
    stays = valid & (~visual | ((visual.cumsum(1) - 1) % before < after))
    counts = stays.sum(1)
    # a stable sort moves what goes to the left, and keeps the order of what stays
    order = stays.long().argsort(dim=1, stable=True)[:, ids.shape[1] - int(counts.max()) :]
    shown = stays.gather(1, order)
    shortened = {
        name: value.gather(1, order).masked_fill(~shown, pad if name == "input_ids" else 0)
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.shape == ids.shape
    }
    return shortened | {"attention_mask": shown.to(valid.dtype).long()}
