"""Videos as whole frames, for methods that compare frames with each other."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.errors import UnsupportedMethodError
from vispress.types import VisualTokens


@dataclass(frozen=True)
class Frames:
    """Where the frames of a bucket's videos lie, on the device of the features.

    Args:
        places: `[F, t]`; token of each place of each frame (of temporal patches: each patch).
        newlines: `[M]`; tokens that carry no picture.
    """

    places: Int[Tensor, "F t"]
    newlines: Int[Tensor, "M"]

    def split(self, num_keep: int) -> tuple[int, Int[Tensor, "m"]]:
        """Split a budget into what frames keep together, and the newlines that stay.

        Newlines count towards the budget; they go when it cannot hold them and a token a frame, but
        for as many as fill a budget that is larger than all frames.
        """
        if num_keep < len(self.newlines) + len(self.places):
            stay = max(0, num_keep - self.places.numel())
            return num_keep - stay, self.newlines[:stay]
        return num_keep - len(self.newlines), self.newlines

    def of(self, values: Float[Tensor, "B N D"]) -> Float[Tensor, "B F t D"]:
        """View values of tokens frame by frame."""
        return values[:, self.places]

    def place_of(self, index: Int[Tensor, "B N"]) -> Int[Tensor, "B N"]:
        """Find the place in its frame of each token of the whole video; -1 for newlines."""
        total, size = self.places.numel() + len(self.newlines), self.places.shape[1]
        table = torch.full((total,), -1, device=index.device)
        table[self.places] = torch.arange(size, device=index.device)
        return table[index]

    def with_newlines(
        self, picked: Int[Tensor, "B n"], newlines: Int[Tensor, "m"]
    ) -> Int[Tensor, "B K"]:
        """Join `picked`, places of all frames in a row, with the newlines; ascending tokens."""
        kept = self.places.flatten()[picked]
        return torch.cat([kept, newlines.expand(len(picked), -1)], dim=1).sort(dim=1).values

    def with_row_newlines(self, picked: Int[Tensor, "n"]) -> Int[Tensor, "K"]:
        """Join `picked`, places of all frames in a row, with newlines of rows that keep a token."""
        kept = self.places.flatten()[picked]
        if not len(self.newlines):
            return kept.sort().values
        total = self.places.numel() + len(self.newlines)
        up_to = torch.zeros(total, dtype=torch.int64, device=kept.device)
        up_to = up_to.index_fill(0, kept, 1).cumsum(dim=0)[self.newlines]
        before = torch.cat([up_to.new_zeros(1), up_to[:-1]])
        return torch.cat([kept, self.newlines[up_to > before]]).sort().values


def check_whole(tokens: VisualTokens, name: str) -> None:
    """Refuse videos that were pruned before.

    Raises:
        UnsupportedMethodError: They were.
    """
    if tokens.num_visual != tokens.num_original:
        raise UnsupportedMethodError(
            f"{name} needs whole images (here: whole videos), got {tokens.num_visual} of "
            f"{tokens.num_original} tokens; put it first in a chain"
        )


def frames(tokens: VisualTokens, name: str, *, pruned: bool = False) -> Frames:
    """Find the frames of a bucket; a plain image is one frame.

    Args:
        tokens: The bucket.
        name: The method, for its error.
        pruned: The video may have been pruned; places are those of the whole one.

    Raises:
        UnsupportedMethodError: The video was pruned before, or its frames differ in size.
    """
    if not pruned:
        check_whole(tokens, name)
    device = tokens.features.device
    if tokens.crops is not None:
        segments = tokens.crops.segment
    else:
        size = tokens.num_original if tokens.grid is None else tokens.grid[1] * tokens.grid[2]
        segments = torch.arange(tokens.num_original) // size
    ids, counts = torch.unique(segments[segments >= 0], return_counts=True)
    if len(set(counts.tolist())) != 1:
        raise UnsupportedMethodError(
            f"{name} needs frames of one size, got sizes {counts.tolist()}; a method without "
            "frames (divprune, say) works"
        )
    places = torch.stack([torch.where(segments == each)[0] for each in ids.tolist()])
    return Frames(places.to(device), torch.where(segments < 0)[0].to(device))
