"""Attention masks of short layers, from positions and validity."""

import torch
from torch import Tensor

from vispress.errors import UnsupportedModelError
from vispress.runtime.kv_cache.slots import Slots
from vispress.runtime.tokens.live_tokens import LiveTokens


def check_implementation(name: str | None) -> str:
    """The kind of mask an attention implementation wants: `"eager"`, `"sdpa"` or `"flash"`.

    Raises:
        UnsupportedModelError: Masks of this implementation cannot be cut (flex, paged, ...).
    """
    name = (name or "eager").removeprefix("vispress_watching_")
    if name in ("eager", "sdpa"):
        return name
    if "flash" in name and "paged" not in name:
        return "flash"
    raise UnsupportedModelError(
        f"attention implementation {name!r} is not supported under compression; "
        "use 'sdpa', 'flash_attention_2' or 'eager'"
    )


def make_mask(
    kind: str,
    rows: LiveTokens,
    slots: Slots,
    past: int,
    offset: int,
    buffer: int,
    given: Tensor | None,
    hidden: Tensor,
) -> Tensor | None:
    """The mask of a short layer, in the form that an attention implementation takes.

    Args:
        kind: As from `check_implementation`.
        rows: Rows that the layer runs on.
        slots: The layer's slots with the chunk stored.
        past: Logical length before the chunk.
        offset: Slot of the first row.
        buffer: Length of the key tensor.
        given: A user's 4-D mask over the logical sequence.
        hidden: Whose device and dtype the mask has.

    Returns:
        None where the implementation needs no mask.
    """
    if kind == "flash":
        return slots.valid
    plain = slots.valid is None and buffer == slots.positions.shape[1]
    if given is None and kind == "sdpa" and plain and (rows.size == 1 or offset == 0):
        return None
    valid = None if slots.valid is None else slots.valid[:, offset : offset + rows.size]
    allow = allowed_keys(rows.index + past, valid, slots, buffer, offset)
    if given is not None:
        return cut_mask(given.to(hidden.device), rows.index, slots, allow)
    return as_kind(allow, kind, hidden.dtype)


def allowed_keys(
    queries: Tensor, query_valid: Tensor | None, slots: Slots, buffer: int, offset: int
) -> Tensor:
    """Which key slots each query row may attend to.

    Args:
        queries: `[B, P]` logical positions of the query rows.
        query_valid: `[B, P]` bool, or None for all.
        slots: The layer's slots with the chunk stored.
        buffer: Length of the key tensor (a static buffer is longer than what is used).
        offset: Slot of the first query row.

    Returns:
        `[B, P, buffer]` bool; no row is all False (padding rows see themselves).
    """
    positions, valid = slots.positions, slots.valid
    spare = buffer - positions.shape[1]
    allow = positions.unsqueeze(1) <= queries.unsqueeze(2)
    if valid is not None:
        allow = allow & valid.unsqueeze(1)
    if spare:
        allow = torch.nn.functional.pad(allow, (0, spare))
    if query_valid is not None:
        P = queries.shape[1]
        own = torch.arange(P, device=queries.device).unsqueeze(1) + offset
        itself = own == torch.arange(buffer, device=queries.device)
        allow = torch.where(query_valid.unsqueeze(2), allow, itself)
    return allow


def cut_mask(mask: Tensor, queries: Tensor, slots: Slots, allow: Tensor) -> Tensor:
    """Take rows and columns of a user's 4-D mask over the logical sequence.

    Args:
        mask: `[B or 1, H or 1, Q, K]` over logical positions, bool (True = attend) or additive.
        queries: `[B, P]` rows of the mask, counted within the chunk.
        slots: The layer's slots with the chunk stored.
        allow: `[B, P, S]`, what causality and validity allow.

    Returns:
        `[B, H, P, S]` of the mask's dtype.
    """
    B, P, S = allow.shape
    mask = mask.expand(B, *mask.shape[1:])
    H = mask.shape[1]
    rows = mask.gather(2, queries[:, None, :, None].expand(B, H, P, mask.shape[-1]))
    columns = slots.positions
    if columns.shape[1] < S:
        columns = torch.nn.functional.pad(columns, (0, S - columns.shape[1]))
    cut = rows.gather(3, columns[:, None, None, :].expand(B, H, P, S))
    if cut.dtype == torch.bool:
        cut = cut & allow.unsqueeze(1)
        return cut | ~cut.any(dim=-1, keepdim=True)  # a padding row may see nothing else
    return cut.masked_fill(~allow.unsqueeze(1), torch.finfo(cut.dtype).min)


def as_kind(allow: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """A `[B, P, S]` bool mask in the form that eager or SDPA attention takes."""
    if kind == "sdpa":
        return allow.unsqueeze(1)
    mask = torch.zeros(allow.shape, dtype=dtype, device=allow.device)
    return mask.masked_fill(~allow, torch.finfo(dtype).min).unsqueeze(1)
