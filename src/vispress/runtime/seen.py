"""What was seen while decoder layers ran: attention rows and module transitions."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vispress.methods.base import upcast
from vispress.runtime.attention import attention_rows
from vispress.runtime.images import Bucket, Image
from vispress.runtime.rows import Rows
from vispress.types import Need, Placement, Queries, Signal
from vispress_kernels import Backend
from vispress_kernels.column_attention import column_attention
from vispress_kernels.query_attention import query_attention


def attention_layers(placement: Placement) -> tuple[int, ...]:
    """Decoder layers whose rows a placement reads, ascending."""
    if placement.queries is None:
        return ()
    last = placement.layer - (0 if placement.attention_of == "next" else 1)
    return tuple(range(last - placement.attention_depth + 1, last + 1))


class EnoughSeen(Exception):  # noqa: N818  (control flow, not an error)
    """Ends a peek at a layer's attention once its rows are read."""


@dataclass(eq=False)
class Wanted:
    """Attention rows to read from one layer.

    Args:
        layer: Decoder layer that computes them.
        queries: Whose rows.
        peek: Read ahead of the layer, on the rows before its placement; else while it runs.
        positions: `[B, R]` int64, their logical positions within the chunk (short samples repeat
            one); R = 0 for the mean over all.
        lengths: Real rows of each sample, on the host.
        reads: Which of attention rows and key norms are wanted.
        until: Decoder layer of the last placement that reads them.
        readers: What each compressor that reads them is made for, by its number in the chain.
    """

    layer: int
    queries: Queries
    peek: bool
    positions: Tensor
    lengths: Sequence[int]
    reads: set[Signal]
    until: int
    readers: dict[int, Need | None] = field(default_factory=dict)
    rows: Tensor | None = None  # [B, H, R, S], from when they are seen until they are used
    key_norms: Tensor | None = None  # [B, S], fp32
    rotary: tuple[Tensor, Tensor] | None = None  # cos and sin, [B or 1, P, D]
    scaling: float = 1.0
    seen: bool = False
    offset: int = 0  # slot of the chunk's first row
    seen_on: Rows | None = None  # rows of the call that was read

    def serves(self, placement: Placement, layer: int) -> bool:
        """Whether these are the rows that a placement reads of a layer."""
        peek = placement.attention_of == "next"
        return (self.layer, self.peek, self.queries) == (layer, peek, placement.queries)

    def needed(self, buckets: Sequence[Bucket]) -> bool:
        """Whether a compressor reads them for any of these images."""
        return any(
            not bucket.passes(needs) and bucket.reads_attention(number)
            for bucket in buckets
            for number, needs in self.readers.items()
        )

    def forget(self) -> None:
        """Let go of what was read, once it is used: many queries are large."""
        self.rows = self.key_norms = self.rotary = self.seen_on = None

    def tail(self, image: Image) -> list[int]:
        """Rows that stand behind an image: the last ones of its sample."""
        length = self.lengths[image.sample]
        return list(range(length - len(image.text_after), length))

    @torch.no_grad()
    def read(
        self,
        rows: Rows,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        valid: Tensor | None,
        plain: bool,
        scaling: float,
        rotary: tuple[Tensor, Tensor] | None,
        backend: Backend,
    ) -> None:
        """Compute the rows from what the layer's attention is called with.

        Args:
            rows: Rows of that call; `offset` is set.
            query: `[B, H, P, D]`, post-RoPE.
            key: `[B, Hkv, S, D]`, the past included.
            mask: 4-D, `[B, S]` (FlashAttention), or None.
            valid: `[B, P]` bool, queries that are no padding; None for all.
            plain: There are no keys but the queries' own, and no mask but causality and padding.
            scaling: Factor on the logits.
            rotary: Tables that the layer rotated q and k by.
            backend: Kernels to use.
        """
        self.seen, self.seen_on = True, rows
        if Signal.KEY_NORMS in self.reads:
            self.key_norms = upcast(key).abs().sum(dim=(1, 3))
        if Signal.ROTARY_PRIOR in self.reads:
            self.rotary, self.scaling = rotary, scaling
        if Signal.QUERY_ATTENTION not in self.reads:
            return
        if self.queries is Queries.ALL and plain:
            key = key[:, :, : query.shape[2]]  # a static buffer is longer
            mean = column_attention(
                query, key, valid=valid, causal=True, scale=scaling, backend=backend
            )
            self.rows = mean.unsqueeze(2)
        elif self.queries is Queries.ALL:
            self.rows = self._mean(query, key, mask, valid, scaling, backend)
        else:
            local = rows.to(query.device).place.gather(1, self.positions.to(query.device))
            self.rows = self._rows(local, query, key, mask, scaling, backend)

    def _mean(
        self,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        valid: Tensor | None,
        scaling: float,
        backend: Backend,
    ) -> Tensor:
        """`[B, H, 1, S]`, a block of queries at a time: as many scores as the keys have numbers."""
        B, H, P, D = query.shape
        every = torch.arange(P, device=query.device).expand(B, P)
        real = torch.ones_like(every) if valid is None else valid.to(query.device).long()
        total: Tensor | None = None
        step = max(1, D * key.shape[1] // H)
        for begin in range(0, P, step):
            block = slice(begin, begin + step)
            rows = self._rows(every[:, block], query, key, mask, scaling, backend)
            part = (rows * real[:, None, block, None]).sum(dim=2, keepdim=True)
            total = part if total is None else total + part
        assert total is not None
        return total / real.sum(dim=1).clamp(min=1)[:, None, None, None]

    def _rows(
        self,
        local: Tensor,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        scaling: float,
        backend: Backend,
    ) -> Tensor:
        """`[B, H, R, S]` of the queries at `local [B, R]`."""
        heads = local[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1])
        query, S = query.gather(2, heads), key.shape[2]
        places: Tensor | None = local + self.offset
        if mask is not None and mask.ndim == 4:  # causality is in the mask
            mask = mask.expand(query.shape[0], *mask.shape[1:])[..., :S]
            index = local[:, None, :, None].expand(-1, mask.shape[1], -1, S)
            mask, places = mask.gather(2, index), None
            if mask.dtype != torch.bool or mask.shape[1] > 1:  # numbers to add, or one a head
                return attention_rows(query, key, mask, scaling)
            mask = mask[:, 0]
        elif mask is not None:
            mask = mask[:, :S].bool()
        return query_attention(
            query, key, rows=places, key_valid=mask, scale=scaling, backend=backend
        )


@dataclass(eq=False)
class Seen:
    """Transition measures of one decoder layer.

    Args:
        rows: Rows of that layer.
        magnitude: `[B, 2, P]`.
        cosine: `[B, 2, P]`.
    """

    rows: Rows
    magnitude: Tensor
    cosine: Tensor
