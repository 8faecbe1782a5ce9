"""Where the tokens of a composed image lie."""

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class CropLayout:
    """Where the tokens of a composed image lie: AnyRes crops and newlines, tiles, video frames.

    The tensors live on the host, so that methods can split budgets without a device sync.

    Args:
        segment: `[N0]` int64; the sub-image (0 is the AnyRes thumbnail, or the first tile or
            frame) of each original token, -1 for newline tokens.
        row: `[N0]` int64; row inside the sub-image, -1 for newline tokens.
        col: `[N0]` int64; column inside the sub-image, -1 for newline tokens.
        thumbnail: Whether sub-image 0 shows what the others show, in little.
    """

    segment: Int[Tensor, "N0"]
    row: Int[Tensor, "N0"]
    col: Int[Tensor, "N0"]
    thumbnail: bool = False

    def key(self) -> tuple[bytes, bool]:
        """Give all of it as a value that can be compared."""
        parts = (self.segment, self.row, self.col)
        return b"".join(part.numpy().tobytes() for part in parts), self.thumbnail

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CropLayout) and self.key() == other.key()

    def __hash__(self) -> int:
        return hash(self.key())
