"""How an encoder lays out its sequences, and what becomes of that while their tokens merge."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Sequences:
    """One row a sequence, `[B, n, ...]`; shorter ones are padded on the right once they differ.

    Args:
        counts: Tokens of each sequence, all equal.
        device: Where the encoder runs.
    """

    def __init__(self, counts: Sequence[int], device: torch.device) -> None:
        self.counts, self.device = list(counts), device
        self.length = max(counts)
        """Places of a row behind the merge that was decided last."""

    def all_tokens(self) -> Tensor:
        """`[B, n]`, each token's own place."""
        return torch.arange(self.length, device=self.device).expand(len(self.counts), -1)

    def apart(self, values: Tensor) -> Tensor:
        """`[B, H, n, D]` values, one row a sequence."""
        return values

    def folded(self, into: Tensor, counts: Sequence[int]) -> Tensor:
        """New places of tokens in the encoder's own layout.

        Args:
            into: One row a sequence, -1 for padding.
            counts: Tokens of each sequence afterwards.
        """
        self.counts, self.length = list(counts), max(counts)
        return into

    def advance(self, into: Tensor) -> None:
        """The layer that merged is over."""

    def arguments(self, kwargs: Mapping[str, Any], unit: int) -> dict[str, Any]:
        """What a layer must be handed in place of what fits the whole sequences."""
        return {}


class Packed(Sequences):
    """All sequences one behind the other, `[1, S, ...]`, with rotary tables and boundaries.

    Args:
        counts: Tokens of each sequence.
        device: Where the encoder runs.
    """

    def __init__(self, counts: Sequence[int], device: torch.device) -> None:
        super().__init__(counts, device)
        self.length = sum(counts)
        self._whole = _starts(counts)
        self._lay_out()
        self._rotary = torch.arange(self.length, device=device)
        """The token whose rotation each token has."""
        self._cuts: dict[int, tuple[Tensor, list[int]]] = {}

    def _lay_out(self) -> None:
        count = torch.tensor(self.counts, device=self.device)
        start = torch.tensor(_starts(self.counts), device=self.device)
        self._row = torch.arange(len(self.counts), device=self.device).repeat_interleave(
            count, output_size=self.length
        )
        self._column = torch.arange(self.length, device=self.device) - start[self._row]
        places = start[:-1, None] + torch.arange(max(self.counts), device=self.device)
        self._table = places.clamp(max=self.length - 1)

    def all_tokens(self) -> Tensor:
        return torch.arange(self.length, device=self.device)[None]

    def apart(self, values: Tensor) -> Tensor:
        return values[0][:, self._table].transpose(0, 1)

    def folded(self, into: Tensor, counts: Sequence[int]) -> Tensor:
        start = torch.tensor(_starts(counts), device=self.device)
        self.counts, self.length = list(counts), sum(counts)
        return (into[self._row, self._column] + start[self._row])[None]

    def advance(self, into: Tensor) -> None:
        """A group has the rotation of its odd member, the one that others joined."""
        number = torch.arange(into.shape[1], device=self.device)
        rank = self._column % 2 * into.shape[1] + number
        best = torch.zeros(self.length, dtype=torch.int64, device=self.device)
        best = best.scatter_reduce(0, into[0], rank, "amax")
        self._rotary = self._rotary[best % into.shape[1]]
        self._lay_out()

    def arguments(self, kwargs: Mapping[str, Any], unit: int) -> dict[str, Any]:
        rows = self._rotary[:, None] * unit + torch.arange(unit, device=self.device)
        tables = tuple(
            table[rows.flatten().to(table.device)] for table in kwargs["position_embeddings"]
        )
        bounds = kwargs["cu_seqlens"]
        if id(bounds) not in self._cuts:  # read on the host once, as unmerged layers do
            self._cuts[id(bounds)] = (bounds, bounds.tolist())
        now = dict(zip(self._whole, _starts(self.counts), strict=True))
        cut = [now[bound // unit] * unit for bound in self._cuts[id(bounds)][1]]
        return {"position_embeddings": tables, "cu_seqlens": bounds.new_tensor(cut)}


def _starts(counts: Sequence[int]) -> list[int]:
    """Where each sequence starts, and where the last one ends."""
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    return starts
