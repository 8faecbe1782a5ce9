"""Removal of duplicates from a ranked list, round by round: a part of VisPruner and FlashVLM."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.methods._parts.scoring.cosines import largest_cosine
from vispress_kernels.products import MOST_HELD, gram

ON_HOST, ON_DEVICE = 1 << 16, MOST_HELD
"""Cosines of the lists that are worked on together, where these are several."""


def remove_duplicates(
    ranked: Int[Tensor, "b R"], x: Float[Tensor, "b n d"], num_keep: int, step: int
) -> Int[Tensor, "b K"]:
    """Drop duplicates from a ranked list until `num_keep` are left, in the list's last order.

    A round drops, of the tokens at even places, those most similar to one at an odd place; the
    survivors go before the odd ones, the most similar first. Of equals the earlier counts as more
    similar; cosines within rounding of 1 are equal, NaN is below all.

    Args:
        ranked: Tokens, the most attended first.
        x: Unit features of all tokens.
        num_keep: K, in `[0, R]`.
        step: Tokens dropped a round, at most.
    """
    length = ranked.shape[1]
    if num_keep in (0, length):
        return ranked[:, :num_keep]
    together = max(1, (ON_DEVICE if x.is_cuda else ON_HOST) // length**2)
    if len(x) <= together:
        return _remove_duplicates(ranked, x, num_keep, step)
    parts = zip(torch.split(ranked, together), torch.split(x, together), strict=True)
    return torch.cat([_remove_duplicates(part, own, num_keep, step) for part, own in parts])


def _remove_duplicates(ranked: Tensor, x: Tensor, num_keep: int, step: int) -> Tensor:
    """Work on places in `ranked`; a round is a few calls, which is its cost on a device."""
    length = ranked.shape[1]
    own = x.gather(1, ranked[..., None].expand(-1, -1, x.shape[2]))
    held = _bounded(gram(own).neg_()) if length**2 <= MOST_HELD else None
    left = torch.arange(length, device=x.device).expand(len(x), -1)
    while length > num_keep:
        even, odd = left[:, 0::2], left[:, 1::2]
        drop = min(step, length - num_keep, even.shape[1])
        distance = (
            _to_nearest(own, even, odd) if held is None else _held_to_nearest(held, even, odd)
        )
        order = distance.sort(dim=1, stable=True)[1]
        left = torch.cat([even.gather(1, order[:, drop:]), odd], dim=1)
        length -= drop
    return ranked.gather(1, left)


def _bounded(distance: Tensor) -> Tensor:
    """Bound negated cosines in place: what rounding made of -1 is one value."""
    return distance.clamp_(min=8 * torch.finfo(distance.dtype).eps - 1)


def _to_nearest(x: Tensor, even: Tensor, odd: Tensor) -> Tensor:
    """Compute the least negated cosine of each even token to an odd one, `[b, E]`."""
    rows = torch.arange(len(x), device=x.device)[:, None]
    return _bounded(-largest_cosine(x[rows, even], x[rows, odd]))


def _held_to_nearest(held: Tensor, even: Tensor, odd: Tensor) -> Tensor:
    """Look it up in negated cosines `[b, R, R]`; of one list by rows and columns: it is faster."""
    if len(held) == 1:
        return held[0].index_select(0, even[0]).index_select(1, odd[0]).amin(dim=1)[None]
    lists = torch.arange(len(held), device=held.device)[:, None, None]
    return held[lists, even[:, :, None], odd[:, None]].amin(dim=2)
