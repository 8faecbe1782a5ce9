"""Products of tokens with each other, of which a greedy selection reads a row a step.

They are held (a Gram matrix) where that takes little memory and fewer operations than a product a
step; otherwise each row is computed when it is read, in memory of O(N D).
"""

import torch
from torch import Tensor

from vispress_kernels.assign_nearest.reference import first_equal

MOST_HELD = 1 << 24
"""Products held where they outnumber the elements of the tokens: those of 4,096 tokens."""
BLOCK = 144
"""Columns of a Gram matrix that are computed at a time."""
FEW = 16
"""Rows read, of so many, from which on all of them in one product are faster than each alone."""


def gram(rows: Tensor) -> Tensor:
    """Products of rows `[B, N, D]` with each other, `[B, N, N]`; of each pair of blocks, once.

    On a GPU all of them at once: half of the product is worth less there than a launch a block.
    """
    B, N, _ = rows.shape
    if N <= BLOCK or rows.is_cuda:
        return rows @ rows.mT
    found = rows.new_empty(B, N, N)
    for i in range(0, N, BLOCK):
        below = rows[:, i:] @ rows[:, i : i + BLOCK].mT
        found[:, i:, i : i + BLOCK] = below
        found[:, i : i + BLOCK, i + BLOCK :] = below[:, BLOCK:].mT
    return found


def fits(N: int, D: int) -> bool:
    """Whether the products of N tokens of width D may be held."""
    return N <= D or N * N <= MOST_HELD


def holds(N: int, D: int, reads: int) -> bool:
    """Whether products of N tokens of width D are held where so many rows of them are read."""
    return fits(N, D) and FEW * reads >= N


def samples_together(x: Tensor) -> int:
    """How many samples of tokens `[B, N, D]` may hold their products at a time; at least 1."""
    B, N, D = x.shape
    return max(1, B if N <= D or not fits(N, D) else MOST_HELD // N**2)


class Products:
    """Rows of products of tokens with each other; equal tokens have equal ones, wherever they are.

    Args:
        tokens: `[B, N, D]`, N at least 1.
        reads: How many rows will be read.
        whole: Whether all rows are needed beside, so that what fits is held at any count of reads.
    """

    def __init__(self, tokens: Tensor, reads: int, *, whole: bool = False) -> None:
        B, N, D = tokens.shape
        self._tokens, self._twin = tokens, first_equal(tokens)
        self._batch = torch.arange(B, device=tokens.device)
        self.held: Tensor | None = None
        if holds(N, D, N if whole else reads):
            self.held = gram(tokens).gather(2, self._twin[:, None].expand(-1, N, -1))

    def row(self, pick: Tensor) -> Tensor:
        """Products `[B, N]` of all tokens with those at `pick`, `[B]`."""
        if self.held is not None:
            return self.held[self._batch, pick]
        one = self._tokens[self._batch, pick][..., None]
        return (self._tokens @ one)[..., 0].gather(1, self._twin)

    def nearest(self) -> Tensor:
        """The largest product `[B, N]` of each token with another; NaN never, -inf without one.

        Only where products are held.
        """
        assert self.held is not None
        none = float("-inf")
        diagonal = self.held.diagonal(dim1=1, dim2=2)
        own = diagonal.clone()
        diagonal.fill_(none)
        blocks = torch.split(self.held, BLOCK, dim=1)
        parts = [rows.nan_to_num(none, neginf=none).amax(2) for rows in blocks]
        diagonal.copy_(own)
        return torch.cat(parts, 1)
