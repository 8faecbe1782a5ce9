"""What was seen while decoder layers ran: attention rows and module transitions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from vispress.devices import sent
from vispress.methods.base import upcast
from vispress.runtime.hooks.attention import Softmax, attention_rows
from vispress.runtime.hooks.head_shards import HeadShards
from vispress.runtime.tokens.images import Bucket, Image, numbered
from vispress.runtime.tokens.live_tokens import LiveTokens
from vispress.types import Need, Placement, Queries, Signal
from vispress_kernels import Backend
from vispress_kernels.column_attention import column_attention
from vispress_kernels.query_attention import query_attention

Mode = Literal["run", "peek", "probe"]
"""When rows are read: while a layer runs, ahead of it on the rows still there, or in a probe."""


def mode_of(placement: Placement) -> Mode:
    """When the rows of a placement are read."""
    if placement.probe is not None:
        return "probe"
    return "peek" if placement.attention_of == "next" else "run"


def attention_layers(placement: Placement) -> tuple[int, ...]:
    """Decoder layers whose rows a placement reads, ascending."""
    if placement.queries is None:
        return ()
    if placement.probe is not None:
        return (placement.probe,)
    last = placement.layer - (0 if placement.attention_of == "next" else 1)
    return tuple(range(last - placement.attention_depth + 1, last + 1))


class EnoughRead(Exception):  # noqa: N818  (control flow, not an error)
    """Ends a peek at a layer's attention, or a probe, once its rows are read."""


@dataclass(eq=False)
class AttentionRead:
    """Attention rows to read from one layer.

    Args:
        layer: Decoder layer that computes them.
        queries: Whose rows.
        mode: When they are read.
        positions: `[B, R]` int64, their logical positions within the chunk (short samples repeat
            one); R = 0 for the mean over all.
        tails: Of each image, which of these rows ask about it.
        reads: Which of attention rows, their means and key norms are wanted.
        until: Decoder layer of the last placement that reads them.
        groups: For the mean over all, where rows of a batch row do not ask about all its images:
            `[M, B, Q]` bool on the host, rows of each group, and the group of each image.
        readers: What each compressor that reads them is made for, by its number in the chain.
    """

    layer: int
    queries: Queries
    mode: Mode
    positions: Tensor
    tails: Mapping[Image, list[int]]
    reads: set[Signal]
    until: int
    groups: tuple[Tensor, Mapping[Image, int]] | None = None
    readers: dict[int, Need | None] = field(default_factory=dict)
    rows: Tensor | None = None  # [B, H, R, S], from when they are seen until they are used
    means: Tensor | None = None  # [B, M, S], fp32, for the images of each sample in order
    key_norms: Tensor | None = None  # [B, S], fp32
    rotary: tuple[Tensor, Tensor] | None = None  # cos and sin, [B or 1, P, D]
    scaling: float = 1.0
    seen: bool = False
    offset: int = 0  # slot of the chunk's first row
    seen_on: LiveTokens | None = None  # rows of the call that was read
    asked: Tensor | None = None  # [B, R], which of them ask

    def serves(self, placement: Placement, layer: int) -> bool:
        """Say whether these are the rows that a placement reads of a layer."""
        asked = (layer, mode_of(placement), placement.queries)
        return (self.layer, self.mode, self.queries) == asked

    def needed(self, buckets: Sequence[Bucket]) -> bool:
        """Say whether a compressor reads them for any of these images."""
        return any(
            not bucket.passes(needs) and bucket.reads_attention(number)
            for bucket in buckets
            for number, needs in self.readers.items()
        )

    def forget(self) -> None:
        """Let go of what was read, once it is used: many queries are large."""
        self.rows = self.means = self.key_norms = self.rotary = self.seen_on = self.asked = None

    def slots(self, local: Tensor) -> Tensor:
        """Where rows of the call that was read are among its layer's keys."""
        return local + self.offset if self.offset else local

    @torch.no_grad()
    def read(
        self,
        rows: LiveTokens,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        valid: Tensor | None,
        plain: bool,
        softmax: Softmax,
        rotary: tuple[Tensor, Tensor] | None,
        backend: Backend,
        documents: Tensor | None = None,
        shards: HeadShards | None = None,
    ) -> None:
        """Compute the rows from what the layer's attention is called with.

        Args:
            rows: Rows of that call; `offset` is set.
            query: `[B, H, P, D]`, post-RoPE.
            key: `[B, Hkv, S, D]`, the past included.
            mask: 4-D, `[B, S]` (FlashAttention), or None.
            valid: `[B, P]` bool, queries that are no padding; None for all.
            plain: There are no keys but the queries' own, and no mask but causality and padding.
            softmax: How the layer makes weights of logits.
            rotary: Tables that the layer rotated q and k by.
            backend: Kernels to use.
            documents: `[B, P]` int64, number of each row's document where rows are packed.
            shards: Processes that have the other heads, if there are any.
        """
        self.seen, self.seen_on = True, rows
        if Signal.KEY_NORMS in self.reads:
            self.key_norms = upcast(key).abs().sum(dim=(1, 3))
        if Signal.ROTARY_PRIOR in self.reads:
            self.rotary, self.scaling = rotary, softmax.scaling
        ask = partial(_attend, query, key, mask, self.offset, softmax, backend, documents)
        # as many scores at a time as the keys have elements
        size = max(1, key[0, :, 0].numel() // query.shape[1])
        if self.queries is not Queries.ALL:
            local = sent(self.positions, query.device)
            local = rows.to(query.device).places_of(local)
            self.asked = local
            if Signal.QUERY_ATTENTION in self.reads:
                self.rows = ask(local)
            if Signal.MEAN_ATTENTION in self.reads:
                self.means = self._means(ask, rows, local, size)
        elif Signal.QUERY_ATTENTION in self.reads and self.groups is not None:
            self.rows = self._grouped_means(ask, query, rows, valid, size)
        elif Signal.QUERY_ATTENTION in self.reads and plain and softmax.plain and documents is None:
            key = key[:, :, : query.shape[2]]  # a static buffer is longer
            self.rows = column_attention(
                query, key, valid=valid, causal=True, scale=softmax.scaling, backend=backend
            ).unsqueeze(2)
        elif Signal.QUERY_ATTENTION in self.reads:
            self.rows = _mean_of_all(ask, query, valid, size)
        if shards is not None:
            self._complete(shards)

    def _complete(self, shards: HeadShards) -> None:
        """Bring the heads of all processes together, in their order."""
        self.rows = None if self.rows is None else shards.gather(self.rows, -3)
        self.means = None if self.means is None else shards.mean(self.means)
        self.key_norms = None if self.key_norms is None else shards.sum(self.key_norms)

    def _means(
        self, ask: Callable[..., Tensor], rows: LiveTokens, local: Tensor, size: int
    ) -> Tensor:
        """`[B, M, S]`: mean over heads and over the rows that ask about each image of a sample."""
        places, counts = numbered(list(self.tails))
        asks = torch.zeros(len(local), max(counts.values()), local.shape[1])
        for image, place in places.items():
            asks[image.sample, place, self.tails[image]] = 1.0
        asks = sent(asks, local.device)
        if not rows.whole:  # of images behind, what is gone does not ask
            there = rows.to(local.device).alive.gather(1, sent(self.positions, local.device))
            living = asks * there[:, None]
            asks = torch.where(living.any(dim=2, keepdim=True), living, asks)
        total: Tensor | None = None
        for start in range(0, max(1, local.shape[1]), size):  # once, where no row asks: zeros
            part = slice(start, start + size)
            probs = ask(local[:, part], mean_heads=True)
            found = asks[:, :, part].to(probs) @ probs
            total = found if total is None else total + found
        assert total is not None
        return total / asks.sum(dim=2, keepdim=True).clamp(min=1.0)

    def _grouped_means(
        self,
        ask: Callable[..., Tensor],
        query: Tensor,
        rows: LiveTokens,
        valid: Tensor | None,
        size: int,
    ) -> Tensor:
        """`[B, M, H, 1, S]`: mean over the rows of each group."""
        assert self.groups is not None
        index = rows.to(query.device).index
        means = []
        for group in sent(self.groups[0], query.device):
            asking = group.gather(1, index)
            asking = asking if valid is None else asking & valid
            means.append(_mean_of_all(ask, query, asking, size))
        return torch.stack(means, dim=1)


def _mean_of_all(
    ask: Callable[..., Tensor], query: Tensor, valid: Tensor | None, size: int
) -> Tensor:
    """`[B, H, 1, S]`: mean over real queries, `size` of them at a time."""
    B, _, P, _ = query.shape
    every = torch.arange(P, device=query.device).expand(B, P)
    real = torch.ones_like(every) if valid is None else valid.to(every)
    total: Tensor | None = None
    for start in range(0, P, size):
        part = slice(start, start + size)
        found = (ask(every[:, part]) * real[:, None, part, None]).sum(dim=2, keepdim=True)
        total = found if total is None else total + found
    assert total is not None
    return total / real.sum(dim=1).clamp(min=1)[:, None, None, None]


def _attend(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    offset: int,
    softmax: Softmax,
    backend: Backend,
    documents: Tensor | None,
    local: Tensor,
    *,
    mean_heads: bool = False,
) -> Tensor:
    """Attention of the rows `local [B, R]` of a call: `[B, H, R, S]`, or `[B, R, S]`."""
    heads = local[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1])
    query, S = query.gather(2, heads), key.shape[2]
    places: Tensor | None = local + offset if offset else local
    if mask is not None and mask.ndim == 4:  # causality is in the mask
        mask = mask.expand(query.shape[0], *mask.shape[1:])[..., :S]
        index = local[:, None, :, None].expand(-1, mask.shape[1], -1, S)
        mask, places = mask.gather(2, index), None
        if mask.dtype != torch.bool or mask.shape[1] > 1:  # numbers to add, or one a head
            found = attention_rows(query, key, mask, softmax)
            return found.mean(dim=1) if mean_heads else found
        mask = mask[:, 0]
    elif mask is not None:
        mask = mask[:, :S].bool()
    if documents is not None and places is not None:  # packed rows of a varlen kernel: no mask
        keys = torch.arange(S, device=local.device)
        same = documents.gather(1, local)[:, :, None] == documents[:, None]
        allowed = same & (keys <= places[:, :, None])
        mask = allowed if mask is None else allowed & mask[:, None]
        places = None
    if not softmax.plain:
        if places is not None:
            seen = torch.arange(S, device=local.device) <= places[:, :, None]
            mask = seen if mask is None else seen & mask[:, None]
        found = attention_rows(query, key, None if mask is None else mask[:, None], softmax)
        return found.mean(dim=1) if mean_heads else found
    return query_attention(
        query,
        key,
        rows=places,
        key_valid=mask,
        scale=softmax.scaling,
        mean_heads=mean_heads,
        backend=backend,
    )


@dataclass(eq=False)
class TransitionMeasure:
    """Transition measures of one decoder layer.

    Args:
        rows: Rows of that layer.
        found: Magnitude and cosine, `[B, P]` each, of attention and (once it ran) the MLP.
    """

    rows: LiveTokens
    found: list[tuple[Tensor, Tensor]]

    @property
    def measures(self) -> list[Tensor]:
        """`[B, P]` each: magnitudes of both modules, then cosines."""
        magnitudes, cosines = zip(*self.found, strict=True)
        return [*magnitudes, *cosines]
