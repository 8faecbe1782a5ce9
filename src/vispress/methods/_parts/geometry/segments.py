"""Plans made sub-image by sub-image (AnyRes crops, tiles) or frame by frame.

For methods that are no `ScorePruner`; the budget is split by `segment_shares`, newlines first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from jaxtyping import Int, Shaped
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

    def tokens(self, index: Int[Tensor, "b n"]) -> Int[Tensor, "..."]:
        """Turn indices into the places (-1: none) into tokens, in the shape of `shaped`."""
        if self.places.ndim == 1:
            return torch.where(index < 0, index, self.places[index])
        index = self.shaped(index)
        found = self.places.expand_as(index).gather(2, index.clamp(min=0))
        return torch.where(index < 0, index, found)

    def shaped(self, values: Shaped[Tensor, "b n"]) -> Shaped[Tensor, "..."]:
        """Shape values of the places as `x[rows, places]` is."""
        return values.view(-1, *self.places.shape)

    def chosen(self, picked: Int[Tensor, "b share"]) -> Int[Tensor, "rows K"]:
        """Turn indices into the places into tokens of each row of the bucket."""
        if self.places.ndim == 1:
            return self.places[picked]
        parts = torch.arange(len(self.places), device=picked.device)[:, None]
        return self.places[parts, picked.view(-1, len(self.places), self.share)].flatten(1)


def split(
    tokens: VisualTokens, num_keep: int, *, pooled: bool = False, together: bool = True
) -> list[list[Part]]:
    """Split each group of bucket rows into parts; one group, unless images were pruned before.

    Args:
        tokens: The bucket.
        num_keep: K, per image.
        pooled: All sub-images and frames are one part; only newlines are told apart.
        together: Parts of one size and share are joined.
    """
    device = tokens.features.device
    if not tokens.segmented:
        places = torch.arange(tokens.num_visual, device=device)
        return [[Part(slice(None), places, num_keep, whole=True)]]
    segments = tokens.segments()
    if tokens.num_visual == tokens.num_original:  # of all tokens, as in each picture of that size
        own = segments[0]
        seen = _Segments(own.numpy().tobytes(), own)
        return [list(_known_parts(seen, num_keep, pooled, together, device))]
    if pooled:
        segments = segments.clamp(max=0)
    if bool((segments == segments[:1]).all()):
        groups = [_parts(slice(None), segments[0], num_keep, device)]
    else:
        rows = [slice(b, b + 1) for b in range(len(segments))]
        groups = [_parts(b, segments[b.start], num_keep, device) for b in rows]
    return [joined(parts) for parts in groups] if together else groups


@dataclass(frozen=True)
class _Segments:
    """Segments of an image's tokens, on the host, compared by value."""

    key: bytes
    own: Tensor = field(compare=False)


@lru_cache(maxsize=64)
@torch.inference_mode(mode=False)  # what is made once may be used in training, too
def _known_parts(
    segments: _Segments, num_keep: int, pooled: bool, together: bool, device: torch.device
) -> tuple[Part, ...]:
    own = segments.own.clamp(max=0) if pooled else segments.own
    parts = _parts(slice(None), own, num_keep, device)
    return tuple(joined(parts) if together else parts)


def _parts(rows: slice, own: Tensor, num_keep: int, device: torch.device) -> list[Part]:
    return [
        _part(rows, torch.where(own == segment)[0].to(device), share, newline=segment == -1)
        for segment, share in segment_shares(own, num_keep).items()
        if share
    ]


def _part(rows: slice, places: Tensor, share: int, *, newline: bool) -> Part:
    """Make a part of a sub-image, or of the first newlines, all of which stay."""
    return Part(rows, places[:share] if newline else places, share, newline)


def joined(parts: Sequence[Part]) -> list[Part]:
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
        own: Gives the same within a part, as indices into its places. Parts of one size and share
            come together.
    """
    parts = [part for group in split(tokens, num_keep) for part in group]
    if parts and parts[0].whole:
        return own(parts[0])
    shape, device = tokens.features.shape[:2], tokens.features.device
    owner = torch.full(shape, -1, dtype=torch.int64, device=device)
    for part in parts:
        owner[part.rows, part.places] = part.places if part.newline else part.tokens(own(part))
    return owner


def keep_by_segment(
    tokens: VisualTokens,
    num_keep: int,
    pick: Callable[[Part], Int[Tensor, "b share"]],
    *,
    pooled: bool = False,
) -> Int[Tensor, "B K"]:
    """Keep what `pick` chooses in each part, ascending; newlines are kept as they are.

    Args:
        tokens: The bucket.
        num_keep: K, per image.
        pick: Gives `share` distinct indices into `part.places` for each of the part's rows; parts
            of one size and share come together.
        pooled: As in `split`.
    """
    kept = []
    for parts in split(tokens, num_keep, pooled=pooled):
        picked = [
            part.places.expand(len(tokens.index[part.rows]), -1)
            if part.newline
            else part.chosen(pick(part))
            for part in parts
        ]
        kept.append(torch.cat(picked, dim=1).sort(dim=1).values)
    return torch.cat(kept)
