"""FlashAttention's calling convention on the CPU: 2-D masks, bounds of documents, or neither."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.modeling_flash_attention_utils import (
    _is_packed_sequence,
    prepare_fa_kwargs_from_position_ids,
)

NAME = "flash_emulated"
VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class Call(NamedTuple):
    """What the kernel was called with.

    Args:
        module: The attention.
        rows: Queries of each batch row.
        mask: `[B, S]`, or None.
        ends: Bounds of documents, or None.
    """

    module: Any
    rows: int
    mask: Tensor | None
    ends: list[int] | None


CALLS: list[Call] = []


def emulated(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal from the bottom right; a 2-D mask says which keys are real, bounds which documents.

    Without both, gapped or restarting position ids are taken for documents, as transformers does.
    """
    mask = attention_mask
    assert mask is None or mask.shape == (k.shape[0], k.shape[2])
    ids, causal = kwargs.get("position_ids"), kwargs.get("is_causal")
    causal = module.is_causal if causal is None else causal
    bounds = [kwargs.get(name) for name in VARLEN]
    if any(bound is None for bound in bounds):
        bounds = [None]
        if mask is None and _is_packed_sequence(ids, len(q)):
            (found, _), (longest, _) = prepare_fa_kwargs_from_position_ids(ids)
            bounds = [found, found, int(longest), int(longest)]
    documents = None if mask is not None or bounds[0] is None else _numbers(q, k, bounds)
    ends = None if documents is None else bounds[0].tolist()
    CALLS.append(Call(module, q.shape[2], mask, ends))
    P, S, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    allow = torch.ones(1, 1, P, S, dtype=torch.bool)
    if causal:
        allow = (torch.arange(S) <= torch.arange(S - P, S)[:, None])[None, None]
    if (window := kwargs.get("sliding_window")) is not None:  # counted in keys
        allow = allow & (torch.arange(S) > torch.arange(S - P, S)[:, None] - window)
    if mask is not None:
        allow = allow & mask[:, None, None].bool()
        allow = allow | ~allow.any(-1, keepdim=True)
    if documents is not None:
        allow = allow & (documents[:, None, :, None] == documents[:, None, None])
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allow, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def _numbers(q: Tensor, k: Tensor, bounds: list[Any]) -> Tensor:
    """`[B, S]` document of each row; a kernel reads what bounds name, whatever is there."""
    ends, again, longest, likewise = bounds
    assert torch.equal(ends, again)
    assert ends.dtype == torch.int32
    assert longest == likewise == int(ends.diff().max())
    assert int(ends[0]) == 0
    assert bool((ends.diff() > 0).all())
    assert q.shape[2] == k.shape[2]
    rows = len(k) * k.shape[2]
    assert int(ends[-1]) == rows, f"bounds end at {int(ends[-1])} of {rows} rows"
    return torch.bucketize(torch.arange(rows), ends[1:].long(), right=True).view(len(k), -1)


@contextmanager
def emulating() -> Iterator[None]:
    """Have the emulated kernel under `NAME`; forgets earlier calls."""
    AttentionInterface.register(NAME, emulated)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    CALLS.clear()
    try:
        yield
    finally:
        AttentionInterface._global_mapping.pop(NAME)
        AttentionMaskInterface._global_mapping.pop(NAME)
        CALLS.clear()


@contextmanager
def running_flash(model: Any) -> Iterator[None]:
    """Let a model's decoder run the emulated kernel."""
    config = model.model.language_model.config
    before, config._attn_implementation = config._attn_implementation, NAME
    try:
        yield
    finally:
        config._attn_implementation = before
