"""Attention masks of short layers: cut from the full sequence's, or made where these are plain."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vispress.errors import UnsupportedModelError
from vispress.runtime.kv_cache.slots import Slots
from vispress.runtime.tokens.live_tokens import LiveTokens

BLOCKED = -1e4
"""Added to a logit, this or less lets nothing through a softmax (`exp` is 0 from -746 on, in fp64);
what is added and is more is a bias."""


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


def check_windows(name: str | None, windows: Sequence[int | None], length: int) -> None:
    """Refuse FlashAttention where a window is shorter than the sequence.

    Such a kernel counts the window in keys; where tokens were dropped, a key is no position.

    Args:
        name: The attention implementation.
        windows: Positions that each decoder layer sees; None for all.
        length: Logical length with the chunk.

    Raises:
        UnsupportedModelError: Names the window, the length, and what works.
    """
    if check_implementation(name) != "flash":
        return
    window = min((window for window in windows if window is not None), default=length)
    if length > window:
        raise UnsupportedModelError(
            f"attention implementation {name!r} counts the model's window of {window} in keys, "
            f"which are no positions under compression, and the sequence has {length}; use 'sdpa' "
            "or 'eager', or keep the sequence within the window"
        )


def allowed(mask: Tensor) -> Tensor:
    """`[B or 1, Q, K]` bool: what some head sees by a 4-D mask, whatever it adds to the logits.

    Args:
        mask: `[B or 1, H or 1, Q, K]`, bool (True = attend) or additive.
    """
    if mask.dtype == torch.bool:
        return mask.any(dim=1)
    return (mask > BLOCKED).any(dim=1)


def shown(mask: Any, past: int, batch: int) -> Tensor | None:
    """Which logical positions are real, read off a 4-D mask: a real token sees itself."""
    if isinstance(mask, dict):  # that of a sliding window has no columns for what is out of it
        given = (m for m in mask.values() if isinstance(m, Tensor) and m.ndim == 4)
        mask = max(given, key=lambda m: m.shape[-1], default=None)
    if not isinstance(mask, Tensor):
        return None
    seen = allowed(mask)
    out = max(0, past + seen.shape[1] - seen.shape[2])
    own = seen.diagonal(offset=past - out, dim1=-2, dim2=-1)
    real = torch.cat([seen[:, :, : past - out].any(dim=1), own], dim=1)
    return torch.nn.functional.pad(real, (out, 0), value=True).expand(batch, -1)


def make_mask(
    kind: str,
    rows: LiveTokens,
    slots: Slots,
    past: int,
    offset: int,
    buffer: int,
    hidden: Tensor,
) -> Tensor | None:
    """Make the mask of a short layer where it is known to be causality and padding alone.

    It has the values that `cut_mask` would give, for fewer operations.

    Args:
        kind: As from `check_implementation`.
        rows: Rows that the layer runs on.
        slots: The layer's slots with the chunk stored.
        past: Logical length before the chunk.
        offset: Slot of the first row.
        buffer: Length of the key tensor.
        hidden: Whose dtype the mask has.

    Returns:
        None where the implementation needs no mask.
    """
    if kind == "flash":
        return slots.valid
    plain = slots.valid is None and buffer == slots.size
    if kind == "sdpa" and plain and (rows.size == 1 or offset == 0):
        return None
    allow = slots.positions.unsqueeze(1) <= (rows.index + past).unsqueeze(2)
    if slots.valid is not None:
        allow = allow & slots.valid.unsqueeze(1)
    if buffer > slots.size:  # a static buffer is longer than what is used
        allow = torch.nn.functional.pad(allow, (0, buffer - slots.size))
    if slots.valid is not None:
        allow = torch.where(_queries(slots, rows, offset), allow, _own(rows, offset, buffer))
    return as_kind(allow, kind, hidden.dtype)


def cut_mask(
    mask: Tensor, rows: LiveTokens, slots: Slots, offset: int, buffer: int, device: torch.device
) -> Tensor:
    """Cut a short layer's mask out of the one that was made for the full sequence.

    Args:
        mask: `[B or 1, H or 1, Q, K]`, bool (True = attend) or additive. Its last column is the
            last logical position (of a sliding window only the latest have one), unless it has more
            columns than there are positions (a static cache): then its first is the first.
        rows: Rows that the layer runs on.
        slots: The layer's slots with the chunk stored.
        offset: Slot of the first row.
        buffer: Length of the key tensor (a static buffer is longer than what is used).
        device: Where the layer runs.

    Returns:
        `[B, H, P, buffer]` of the mask's dtype; padding rows see themselves, to stay finite.
    """
    B, P = rows.index.shape
    H, K = mask.shape[1], mask.shape[3]
    columns, seen, first = slots.positions, slots.valid, slots.logical - K
    if first > 0:
        columns = columns - first
        inside = columns >= 0
        seen, columns = inside if seen is None else seen & inside, columns.clamp(min=0)
    spare = buffer - columns.shape[1]
    if spare:
        seen = torch.ones_like(columns, dtype=torch.bool) if seen is None else seen
        seen, columns = (torch.nn.functional.pad(x, (0, spare)) for x in (seen, columns))
    mask = mask.to(device).expand(B, -1, -1, -1)
    cut = mask.gather(2, rows.index[:, None, :, None].expand(-1, H, -1, K))
    cut = cut.gather(3, columns[:, None, None, :].expand(-1, H, P, -1))
    least, most = (False, True) if cut.dtype == torch.bool else (torch.finfo(cut.dtype).min, 0.0)
    if seen is not None:
        cut = cut.masked_fill(~seen[:, None, None], least)
    if slots.valid is not None:
        own = torch.full_like(cut[:1, :1], least).masked_fill_(_own(rows, offset, buffer), most)
        cut = torch.where(_queries(slots, rows, offset)[:, None], cut, own)
    return cut


def with_bias(mask: Tensor | None, bias: Tensor, queries: int, dtype: torch.dtype) -> Tensor:
    """Add to the logits of keys that a mask shows, and leave hidden what it hides.

    Args:
        mask: `[B or 1, H or 1, P, S]`, bool (True = attend) or additive; None for causality.
        bias: `[B, S]` (differentiable).
        queries: P.
        dtype: Of the queries.

    Returns:
        `[B, H or 1, P, S]`, additive.
    """
    added = bias[:, None, None].to(dtype)
    if mask is None:
        mask = torch.ones(queries, bias.shape[1], dtype=torch.bool, device=bias.device).tril()
    if mask.dtype == torch.bool:  # where all is hidden, as in padding, the least stays finite
        return torch.where(mask, added, torch.finfo(dtype).min)
    return torch.where(mask > BLOCKED, mask + added, mask)


def _queries(slots: Slots, rows: LiveTokens, offset: int) -> Tensor:
    """`[B, P, 1]` bool: rows that are no padding."""
    assert slots.valid is not None
    return slots.valid[:, offset : offset + rows.size].unsqueeze(2)


def _own(rows: LiveTokens, offset: int, buffer: int) -> Tensor:
    """`[P, buffer]` bool: the slot of each row."""
    device = rows.index.device
    here = torch.arange(rows.size, device=device).unsqueeze(1) + offset
    return here == torch.arange(buffer, device=device)


def as_kind(allow: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """A `[B, P, S]` bool mask in the form that eager or SDPA attention takes."""
    if kind == "sdpa":
        return allow.unsqueeze(1)
    mask = torch.zeros(allow.shape, dtype=dtype, device=allow.device)
    return mask.masked_fill(~allow, torch.finfo(dtype).min).unsqueeze(1)
