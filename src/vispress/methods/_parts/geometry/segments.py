"""Plans made sub-image by sub-image (AnyRes crops, tiles) or frame by frame.

For methods that are no `ScorePruner`; the budget is split by `segment_shares`, newlines first.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from vispress.methods.base import segment_shares
from vispress.types import Signal, VisualTokens

GEOMETRY = frozenset({Signal.GRID, Signal.CROPS})
"""What a per-segment method reads to know its segments."""


@dataclass(frozen=True)
class Part:
    """One sub-image or frame of some rows of the bucket.

    Args:
        rows: Rows of the bucket that have these places.
        places: `[n]`; tokens of the part, ascending, on the device of the features. Or `[p, n]`:
            those of p parts of one size and share, which count as rows of the bucket.
        share: How many of them are to be kept; all newlines that are given.
        newline: Whether these are newline tokens that stay, which carry no picture.
        whole: Whether these are all tokens of all rows.
    """

    rows: slice
    places: Int[Tensor, "*p n"]
    share: int
    newline: bool = False
    whole: bool = False

    def of(self, values: Tensor) -> Tensor:
        """Select the part of `[B, N, ...]` that belongs to these rows and places, `[b, n, ...]`."""
        if self.whole:
            return values
        own = values[self.rows][:, self.places]
        return own if self.places.ndim == 1 else own.flatten(0, 1)

    def chosen(self, picked: Int[Tensor, "b share"]) -> Int[Tensor, "rows K"]:
        """Turn indices into the places into tokens of each row of the bucket."""
        if self.places.ndim == 1:
            return self.places[picked]
        parts = torch.arange(len(self.places), device=picked.device)[:, None]
        return self.places[parts, picked.view(-1, len(self.places), self.share)].flatten(1)


def split(tokens: VisualTokens, num_keep: int, *, pooled: bool = False) -> list[list[Part]]:
    """Split each group of bucket rows into parts; one group, unless images were pruned before.

    Args:
        tokens: The bucket.
        num_keep: K, per image.
        pooled: All sub-images and frames are one part; only newlines are told apart.
    """
    device = tokens.features.device
    if not tokens.segmented:
        places = torch.arange(tokens.num_visual, device=device)
        return [[Part(slice(None), places, num_keep, whole=True)]]
    segments = tokens.segments()
    if pooled:
        segments = segments.clamp(max=0)
    if bool((segments == segments[:1]).all()):
        groups = [(slice(None), segments[0])]
    else:
        groups = [(slice(b, b + 1), own) for b, own in enumerate(segments)]
    return [
        [
            _part(rows, torch.where(own == segment)[0].to(device), share, newline=segment == -1)
            for segment, share in segment_shares(own, num_keep).items()
            if share
        ]
        for rows, own in groups
    ]


def _part(rows: slice, places: Tensor, share: int, *, newline: bool) -> Part:
    """Make a part of a sub-image, or of the first newlines, all of which stay."""
    return Part(rows, places[:share] if newline else places, share, newline)


def joined(parts: list[Part]) -> list[Part]:
    """Join the parts of one size and share, which are then worked on at once."""
    found: dict[tuple[int, int, bool], list[Part]] = {}
    for part in parts:
        found.setdefault((len(part.places), part.share, part.newline), []).append(part)
    return [
        replace(first, places=torch.stack([part.places for part in (first, *others)]))
        if others
        else first
        for first, *others in found.values()
    ]


def owner_by_segment(
    tokens: VisualTokens, num_keep: int, own: Callable[[Part], Int[Tensor, "b n"]]
) -> Int[Tensor, "B N"]:
    """Find the token that each one goes to, -1 for none; newlines that are kept are their own.

    Args:
        tokens: The bucket.
        num_keep: K, per image.
        own: Gives the same within a part, as indices into its places.
    """
    parts = [part for group in split(tokens, num_keep) for part in group]
    if parts and parts[0].whole:
        return own(parts[0])
    shape, device = tokens.features.shape[:2], tokens.features.device
    owner = torch.full(shape, -1, dtype=torch.int64, device=device)
    for part in parts:
        into = part.places
        if not part.newline:
            found = own(part)
            into = torch.where(found < 0, found, part.places[found])
        owner[part.rows, part.places] = into
    return owner


def keep_by_segment(
    tokens: VisualTokens,
    num_keep: int,
    pick: Callable[[Part], Int[Tensor, "b share"]],
    *,
    pooled: bool = False,
    alike: bool = False,
) -> Int[Tensor, "B K"]:
    """Keep what `pick` chooses in each part, ascending; newlines are kept as they are.

    Args:
        tokens: The bucket.
        num_keep: K, per image.
        pick: Gives `share` distinct indices into `part.places` for each of the part's rows.
        pooled: As in `split`.
        alike: `pick` is given parts of one size and share together.
    """
    index = torch.arange(tokens.batch, device=tokens.features.device)
    kept = []
    for parts in split(tokens, num_keep, pooled=pooled):
        picked = [
            part.places.expand(len(index[part.rows]), -1)
            if part.newline
            else part.chosen(pick(part))
            for part in (joined(parts) if alike else parts)
        ]
        kept.append(torch.cat(picked, dim=1).sort(dim=1).values)
    return torch.cat(kept)
