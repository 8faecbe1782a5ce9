"""How an encoder lays out its sequences, and what becomes of that while their tokens merge."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vispress.devices import sent
from vispress_kernels import Backend
from vispress_kernels.gather_tokens import gather_tokens_many


class Sequences:
    """One row a sequence, `[B, n, ...]`; shorter ones are padded on the right once they differ.

    Args:
        counts: Tokens of each sequence before the first merge, then behind each merge.
        device: Where the encoder runs.
        unit: Patches of a token.
        backend: Kernels to use.
    """

    def __init__(
        self, counts: Sequence[Sequence[int]], device: torch.device, unit: int, backend: Backend
    ) -> None:
        self.counts, self.device, self.unit, self.backend = counts, device, unit, backend
        self.merged = 0
        """Merges that are over."""
        self._lay_out()

    def _lay_out(self) -> None:
        """Work out what the counts say of the merges to come."""

    @property
    def padded(self) -> bool:
        """Tell whether some places of the rows have no token."""
        return len(set(self.counts[self.merged])) > 1

    @property
    def left(self) -> int:
        """Places of a row behind the merge that comes next."""
        return max(self.counts[self.merged + 1])

    def apart(self, values: Tensor) -> Tensor:
        """`[B, H, n, D]` values, one row a sequence."""
        return values

    def folded(self, into: Tensor) -> Tensor:
        """New places of tokens in the encoder's own layout.

        Args:
            into: One row a sequence, below 0 for padding.
        """
        return into

    def advance(self, into: Tensor) -> None:
        """The layer that merged is over."""
        self.merged += 1

    def arguments(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Give what a layer must be handed in place of what fits the whole sequences."""
        return {}


class Packed(Sequences):
    """All sequences one behind the other, `[1, S, ...]`, with rotary tables and boundaries."""

    def _lay_out(self) -> None:
        """Where tokens are at each merge, for all merges at once."""
        count = torch.tensor(self.counts)
        self._starts = F.pad(count.cumsum(1), (1, 0))
        """`[merges + 1, sequences + 1]` on the host: where each starts, and where the last ends."""
        self._sizes: list[int] = self._starts[:, -1].tolist()
        count, start, later = count[:-1], self._starts[:-1, :-1], self._starts[1:, :-1]
        width = count.amax(1, keepdim=True)
        row = torch.arange(count.shape[1]) * width
        first = count.flatten().cumsum(0).view_as(count) - count
        known = sent(torch.stack([start, count, row, first, later]), self.device)
        start, count = known[:2]
        sizes, device = self._sizes[:-1], self.device
        # of each token of each merge: its sequence's
        row, first, later = (
            known[2:].flatten(1).repeat_interleave(count.flatten(), dim=1, output_size=sum(sizes))
        )
        column = torch.arange(sum(sizes), device=device) - first
        self._place = (row + column).split(sizes)
        """Of each token in `[sequences, width]`."""
        self._later = later.split(sizes)
        """Where each token's sequence starts behind the merge."""
        self._odd = (column % 2 * sizes[0]).split(sizes)
        """Above every token's number for the odd tokens of sequences, else 0."""
        columns = torch.arange(int(width.max()), device=device)
        self._table = start[..., None] + columns.minimum(count[..., None] - 1)
        """`[merges, sequences, width]`, the token of each place; the last one again for padding."""
        self._rotary = torch.arange(sizes[0], device=device)
        """The token whose rotation each token has."""
        self._turned: tuple[Any, tuple[Tensor, ...]] | None = None
        self._cuts: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def padded(self) -> bool:
        return False

    @property
    def left(self) -> int:
        return self._sizes[self.merged + 1]

    def apart(self, values: Tensor) -> Tensor:
        table = self._table[self.merged, :, : max(self.counts[self.merged])]
        return values[0][:, table].transpose(0, 1)

    def folded(self, into: Tensor) -> Tensor:
        placed: Tensor = into.reshape(-1)[self._place[self.merged]] + self._later[self.merged]
        return placed[None]

    def advance(self, into: Tensor) -> None:
        """A group has the rotation of its odd member, the one that others joined."""
        best = self._rotary.new_zeros(self.left)
        best = best.scatter_reduce_(0, into[0], self._rotary + self._odd[self.merged], "amax")
        self._rotary = best % self._sizes[0]
        self._turned = None
        super().advance(into)

    def arguments(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        tables, bounds = kwargs["position_embeddings"], kwargs["cu_seqlens"]
        if self._turned is None or self._turned[0] is not tables:
            keep = self._rotary[None].to(tables[0].device)
            wide = [table.reshape(1, self._sizes[0], -1) for table in tables]
            turned = gather_tokens_many(wide, keep, backend=self.backend)
            pairs = zip(turned, tables, strict=True)
            self._turned = tables, tuple(rows.view(-1, table.shape[-1]) for rows, table in pairs)
        if id(bounds) not in self._cuts:  # read on the host once, as unmerged layers do
            self._cuts[id(bounds)] = bounds, self._cut(bounds)
        cut = self._cuts[id(bounds)][1][self.merged]
        return {"position_embeddings": self._turned[1], "cu_seqlens": cut}

    def _cut(self, bounds: Tensor) -> Tensor:
        """Boundaries behind each merge, on the host, where layers read them without a wait."""
        number = {start: i for i, start in enumerate(self._starts[0].tolist())}
        which = [number[bound // self.unit] for bound in bounds.tolist()]
        return (self._starts[:, which] * self.unit).to(bounds.dtype)


def bounds_of(mask: Tensor | None) -> Tensor | None:
    """Find where images begin in a packed sequence, by its block mask (Pixtral).

    Args:
        mask: `[1, 1, S, S]`, additive or bool; whole blocks on its diagonal.

    Returns:
        `[images + 1]` int32, the end last; None without a mask.
    """
    if mask is None:
        return None
    before = mask[0, 0].diagonal(-1)
    begins = (~before if before.dtype == torch.bool else before < 0).nonzero().flatten() + 1
    ends = torch.tensor([mask.shape[-1]], device=mask.device)
    return torch.cat([torch.zeros_like(ends), begins, ends]).int()
