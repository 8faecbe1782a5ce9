"""Which rows of the current chunk live from a decoder layer on, and how tensors follow them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vispress.devices import sent
from vispress_kernels import Backend
from vispress_kernels.gather_tokens import gather_tokens, gather_tokens_many

VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Keyword arguments of a varlen kernel: bounds of documents, and tokens of the longest."""


@dataclass
class LiveTokens:
    """The rows of one stage: a right-aligned selection of the chunk's logical positions.

    Args:
        index: `[B, P]` int64, logical position within the chunk; arbitrary where invalid.
        valid: `[B, P]` bool, or None when every row is a real token. Invalid rows stand left.
        length: Logical length of the chunk (Q).
        counts: Valid rows of each sample, on the host.
        dropped: `[B, Q]` bool, visual tokens dropped so far by placements with compact positions.
        whole: The stage before any placement: every logical position, padding included.
        starts: `[B, Q]` int64, where the document of each position begins; None where rows are
            not packed.
        document_counts: Valid rows of each document, on the host; empty where rows are not packed.
    """

    index: Tensor
    valid: Tensor | None
    length: int
    counts: tuple[int, ...]
    dropped: Tensor | None = None
    whole: bool = False
    starts: Tensor | None = None
    document_counts: tuple[int, ...] = ()
    gone: Tensor | None = None
    """`[B, Q]` bool, logical positions without a row, where that is at hand."""
    _twins: dict[torch.device, "LiveTokens"] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Physical rows (P)."""
        return self.index.shape[1]

    @property
    def complete(self) -> bool:
        """Whether every logical position has its row, so that positions are places."""
        return self.whole or (self.valid is None and self.size == self.length)

    @cached_property
    def alive(self) -> Tensor:
        """`[B, Q]` bool: which logical positions have a row."""
        if self.whole:
            return torch.ones_like(self.index, dtype=torch.bool)
        if self.gone is not None:
            return ~self.gone
        alive = torch.zeros(
            self.index.shape[0], self.length + 1, dtype=torch.bool, device=self.index.device
        )
        target = (
            self.index if self.valid is None else self.index.masked_fill(~self.valid, self.length)
        )
        return alive.scatter(1, target, True)[:, :-1]

    @cached_property
    def place(self) -> Tensor:
        """`[B, Q]` int64: the row of each logical position; for dead ones, of the nearest earlier.

        Positions before the first survivor of their document point to it.
        """
        if self.whole:
            return self.index
        count = self.alive.cumsum(1)
        number = (count - 1).clamp(min=0)
        if self.starts is not None:
            number = number.maximum((count - self.alive.long()).gather(1, self.starts))
        if self.valid is not None:  # else rows of all samples begin at the left
            empty = torch.tensor([self.size - count for count in self.counts])
            number = sent(empty, self.index.device).unsqueeze(1) + number
        some = min(self.counts) > 0 and self.starts is None
        return number if some else number.clamp(max=self.size - 1)  # else there may be no survivor

    def places_of(self, positions: Tensor) -> Tensor:
        """`[B, n]` int64: `place` of some logical positions, without that of all."""
        if self.complete:
            return positions
        if self.valid is not None or self.starts is not None:
            return self.place.gather(1, positions)
        index = self.index.contiguous()  # torch warns of what it would copy itself
        return (torch.searchsorted(index, positions.contiguous(), right=True) - 1).clamp(min=0)

    @cached_property
    def shift(self) -> Tensor | None:
        """`[B, P]` int64: by how much compact position ids are smaller, or None for no change."""
        if self.dropped is None:
            return None
        # a survivor is never dropped: inclusive == exclusive
        before = self.dropped.cumsum(1)
        shift = before.gather(1, self.index)
        if self.starts is None:
            return shift
        earlier = before - self.dropped.long()  # what was dropped in documents ahead of a row's
        return shift - earlier.gather(1, self.starts.gather(1, self.index))

    @cached_property
    def total_shift(self) -> Tensor | None:
        """`[B]` int64: the shift of everything behind the chunk."""
        if self.dropped is None or self.starts is None:
            return None if self.dropped is None else self.dropped.sum(1)
        ahead = torch.arange(self.length, device=self.index.device) < self.starts[:, -1:]
        return (self.dropped & ~ahead).sum(1)

    @cached_property
    def bounds(self) -> tuple[Tensor, int]:
        """`[D + 1]` int32, where documents of the whole batch end, as if its rows were one; and the
        tokens of the longest. Padding in front of a row is a document of its own.
        """
        counts, documents = [], iter(self.document_counts)
        for count in self.counts:
            counts.append(self.size - count)
            while count:
                counts.append(next(documents))
                count -= counts[-1]
        ends = torch.tensor([0, *(n for n in counts if n)], dtype=torch.int32)
        return sent(ends.cumsum(0, dtype=torch.int32), self.index.device), max(counts)

    def to(self, device: torch.device) -> "LiveTokens":
        """The same rows on another device (sharded models); one twin a device."""
        if self.index.device == device:
            return self
        if device not in self._twins:
            self._twins[device] = LiveTokens(
                self.index.to(device),
                None if self.valid is None else self.valid.to(device),
                self.length,
                self.counts,
                None if self.dropped is None else self.dropped.to(device),
                self.whole,
                None if self.starts is None else self.starts.to(device),
                self.document_counts,
            )
        return self._twins[device]


def all_live(batch: int, length: int, counts: tuple[int, ...], device: torch.device) -> LiveTokens:
    """The stage before any placement: every logical position has its row, padding included."""
    index = torch.arange(length, device=device).expand(batch, length)
    return LiveTokens(index, None, length, counts, whole=True)


def narrow(
    rows: LiveTokens,
    drop: Tensor,
    drop_counts: tuple[int, ...],
    *,
    compact: bool,
    valid: Tensor | None,
    document_drops: tuple[int, ...] = (),
) -> tuple[LiveTokens, Tensor]:
    """Drop logical positions (and, at the first placement, padding).

    Args:
        rows: Current rows.
        drop: `[B, Q]` bool, visual tokens to drop now.
        drop_counts: How many that is for each sample, on the host.
        compact: Whether later position ids close the gap.
        valid: `[B, P]` bool, current rows that are real tokens, or None for all.
        document_drops: As `drop_counts`, of each document where rows are packed.

    Returns:
        The new rows, and `[B, P']` the place of each in the current ones.
    """
    counts = tuple(have - gone for have, gone in zip(rows.counts, drop_counts, strict=True))
    size = max(counts)
    gone = drop if rows.complete else drop.gather(1, rows.index)
    if valid is not None:
        gone = gone | ~valid
    # stable: survivors keep their order and end up at the right, whatever fills the left is invalid
    order = gone.view(torch.uint8).argsort(dim=1, stable=True, descending=True)
    local = order[:, rows.size - size :]
    new_valid = None
    if min(counts) < size:
        pad = sent(torch.tensor([size - count for count in counts]), gone.device)
        new_valid = torch.arange(size, device=gone.device) >= pad.unsqueeze(1)
    dropped = rows.dropped
    if compact:
        dropped = drop if dropped is None else dropped | drop
    index = local if rows.complete else rows.index.gather(1, local)
    left = tuple(a - b for a, b in zip(rows.document_counts, document_drops, strict=True))
    new = LiveTokens(
        index, new_valid, rows.length, counts, dropped, starts=rows.starts, document_counts=left
    )
    new.gone = gone if rows.complete else None
    return new, local


def varlen_kwargs(rows: LiveTokens, kind: str | None, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Boundaries of packed documents for a varlen kernel, cut to the rows that live.

    Args:
        rows: Live tokens of rows with several documents.
        kind: As from `masks.check_implementation`; other kinds than "flash" have a mask.
        kwargs: Keyword arguments of the layer; boundaries that are not there are not missed.
    """
    if kind != "flash" and kwargs.get("cu_seq_lens_q") is None:
        return {}
    bounds, longest = rows.bounds
    return dict(zip(VARLEN, (bounds, bounds, longest, longest), strict=True))


def gather_rows(x: Tensor, local: Tensor, backend: Backend) -> Tensor:
    """`x[b, local[b, p]]` for `[B, P, D]`, differentiable."""
    return gather_tokens(x, local, backend=backend)


def scale_rows(x: Tensor, gate: Tensor, rows: LiveTokens) -> Tensor:
    """Multiply `[B, P, D]` of some rows by their gate, differentiable.

    Args:
        x: Their values.
        gate: `[B, Q]` by logical position, in at least fp32.
        rows: Which they are.
    """
    own = gate.to(x.device)
    own = own if rows.complete else own.gather(1, rows.to(x.device).index)
    return (x * own.unsqueeze(-1)).to(x.dtype)


def gather_rotary(
    tables: tuple[Tensor, Tensor], index: Tensor, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Rows of both rotary tables `[B or 1, Q, D]` or `[3, B or 1, Q, D]`, in one launch."""
    B = index.shape[0]
    # a table may hold three axes (M-RoPE) and one batch row for all: neither is copied
    rows = [table.movedim((-3, -2), (0, 1)) for table in tables]
    cos, sin = gather_tokens_many(
        [table.expand(B, *table.shape[1:]) for table in rows], index, backend=backend
    )
    return cos.movedim((0, 1), (-3, -2)), sin.movedim((0, 1), (-3, -2))


def live_deepstack(
    rows: LiveTokens, hidden: Tensor, visual: Tensor, embeds: Tensor, backend: Backend
) -> Tensor:
    """Add values to visual places (one a mark) where they still live; no mark is counted.

    Args:
        rows: Live tokens.
        hidden: `[B, P, D]`, theirs.
        visual: `[B, Q]` bool.
        embeds: `[marks, D]`.
        backend: Kernels to use.
    """
    rows, visual = rows.to(hidden.device), visual.to(hidden.device)
    number = (visual.flatten().long().cumsum(0) - 1).view_as(visual)  # row of embeds
    here, number = gather_tokens_many((visual, number), rows.index, backend=backend)
    here = here if rows.valid is None else here & rows.valid
    if not len(embeds):
        return hidden
    own = embeds.to(hidden)[number.clamp(min=0)]
    return torch.where(here[..., None], hidden + own, hidden)
