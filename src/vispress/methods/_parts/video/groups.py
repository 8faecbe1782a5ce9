"""Groups of a video's tokens, merged each on its own: what PruneVid and HoliTom share.

A scene's places that stay the same (static) are one group, of means over the scene's frames; what
changes (dynamic) is a group a frame. A static token stands in the first frame of its scene.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vispress.budget import allocate
from vispress.methods._parts.clustering.density_peaks import dpc_clusters
from vispress.methods._parts.clustering.owners import kept_and_slots, ragged
from vispress.methods._parts.scoring.cosines import unit
from vispress.methods._parts.video.frames import Frames
from vispress.methods._parts.video.scenes import (
    Scene,
    adjacent_cosine,
    refined,
    saving_scenes,
    scenes_of,
)
from vispress.methods.base import descending
from vispress.types import TokenPlan

FEW = 14
"""Groups of so many tokens are not merged, unless a budget asks for it."""


@dataclass(frozen=True)
class Group:
    """Tokens of a video that are merged with each other only.

    Args:
        frame: The first frame.
        length: Frames over which each place is averaged; 1 for the places of one frame.
        places: `[n]` places in a frame, ascending, on the device of the features.
        static: Whether this is what stays the same in a scene.
    """

    frame: int
    length: int
    places: Int[Tensor, "n"]
    static: bool

    def tokens(self, x: Float[Tensor, "F t D"]) -> Float[Tensor, "n D"]:
        """Average over the frames."""
        return x[self.frame : self.frame + self.length, self.places].mean(dim=0)


def alike(x: Float[Tensor, "W t D"]) -> Float[Tensor, "t"]:
    """Average a unit token's cosine to its place in the other frames; -2 in a lone frame."""
    count = x.shape[0]
    if count == 1:
        return x.new_full(x.shape[1:2], -2.0)
    return (x.sum(dim=0).square().sum(dim=1) - count) / (count * (count - 1))


def groups_of(
    scenes: Sequence[Scene], static: Bool[Tensor, "F t"], device: torch.device
) -> list[Group]:
    """List the groups of one video, scene by scene: static places, then each frame's others.

    Args:
        scenes: Runs of frames.
        static: On the host, equal in all frames of a scene.
        device: Of the features.
    """
    found = []
    for start, end in scenes:
        same, other = (torch.where(mask)[0].to(device) for mask in (static[start], ~static[start]))
        found.append(Group(start, end - start, same, True))
        found += [Group(frame, 1, other, False) for frame in range(start, end)]
    return [group for group in found if len(group.places)]


@torch.no_grad()
def saving_groups(
    x: Float[Tensor, "B F t D"], threshold: float, longest: int = 1024
) -> list[list[Group]]:
    """Make HoliTom's groups, of the cut that saves most; waits once for the device.

    Args:
        x: Tokens, at least fp32.
        threshold: Cosine above which a place is the same in two frames.
        longest: Frames of a run at most.
    """
    same = (adjacent_cosine(x) > threshold).cpu()
    found = []
    for own in same:
        scenes, _ = saving_scenes(own, longest)
        static = torch.zeros(x.shape[1:3], dtype=torch.bool)
        for start, end in scenes:
            if end - start > 1:
                static[start:end] = own[start : end - 1].all(dim=0)
        found.append(groups_of(scenes, static, x.device))
    return found


@torch.no_grad()
def static_groups(
    x: Float[Tensor, "B F t D"], scenes: float, threshold: float, neighbours: int
) -> list[list[Group]]:
    """Make PruneVid's groups of each video; waits twice for the device.

    Args:
        x: Tokens, at least fp32.
        scenes: Clusters of frames, as a fraction of the frames.
        threshold: A place stays the same where it is `alike` above this.
        neighbours: Frames that a density looks at.
    """
    count = max(1, int(x.shape[1] * scenes))
    labels = dpc_clusters(x.mean(dim=2), count, neighbours=neighbours)[1].tolist()
    cuts = [scenes_of(refined(row)) for row in labels]
    same = [
        torch.cat([alike(own[start:end]).expand(end - start, -1) for start, end in row])
        for own, row in zip(unit(x), cuts, strict=True)
    ]
    static = (torch.stack(same) > threshold).cpu()
    return [groups_of(row, own, x.device) for row, own in zip(cuts, static, strict=True)]


def shares(groups: Sequence[Group], num_keep: int, merged: float = 1.0) -> tuple[int, ...]:
    """Share a budget among groups: of many tokens a fraction at most."""
    sizes = [len(group.places) for group in groups]
    few = [n if n <= FEW else max(1, int(merged * n)) for n in sizes]
    return allocate(num_keep, few)


Merge = Callable[[int, Group, int], tuple[Int[Tensor, "n"], Float[Tensor, "n"]]]
"""For a row of the bucket, a group and how many it keeps, at least 1: the member each one is folded
into, -1 for none; and its weight there."""


def clusters(x: Float[Tensor, "n D"], count: int, neighbours: int) -> Int[Tensor, "n"]:
    """Find the centre that each token is folded into; itself, where all stay."""
    if count >= len(x):
        return torch.arange(len(x), device=x.device)
    centres, label = dpc_clusters(x[None], count, neighbours=neighbours)
    return centres[0, label[0]]


def beside_top(
    x: Float[Tensor, "n D"], score: Float[Tensor, "n"], top: int, count: int, neighbours: int
) -> Int[Tensor, "n"]:
    """Keep the `top` best, and cluster the others; -1 where `count` is 0."""
    ranked = descending(score[None])[0]
    kept, rest = ranked[:top], ranked[top:].sort().values
    owner = torch.full_like(ranked, -1)
    owner[kept] = kept
    if count:
        owner[rest] = rest[clusters(x[rest], count, neighbours)]
    return owner


def _sizes(owner: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
    """Count the members of each token's cluster; 0 and more for tokens that are in none."""
    into, member = owner.clamp(min=0), (owner >= 0).long()
    return torch.zeros_like(owner).scatter_add(0, into, member)[into]


def mean_weights(owner: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Weigh all members of a cluster alike, its centre too."""
    return 1 / _sizes(owner).clamp(min=1).float()


def centre_weights(owner: Int[Tensor, "n"], own: float) -> Float[Tensor, "n"]:
    """Weigh a centre by `own`, and by `1 - own` the mean of the others; by 1 where there are none.

    Others are the cluster's members but for the centre.
    """
    others = _sizes(owner) - 1
    centre = owner == torch.arange(len(owner), device=owner.device)
    beside = (1 - own) / others.clamp(min=1).float()
    return torch.where(centre, torch.where(others > 0, own, 1.0), beside)


def merge_groups(
    video: Frames,
    newlines: Int[Tensor, "m"],
    groups: Sequence[Sequence[Group]],
    counts: Sequence[Sequence[int]],
    merge: Merge,
) -> TokenPlan:
    """Merge each group of each video to its count; newlines stay as they are."""
    number, size = video.places.shape
    owners = torch.full((len(groups), number, size), -1, device=video.places.device)
    weights = torch.ones(owners.shape, device=owners.device)
    for row, (own, shares) in enumerate(zip(groups, counts, strict=True)):
        for group, count in zip(own, shares, strict=True):
            if count:
                into, share = merge(row, group, count)
                places = group.frame * size + group.places[into.clamp(min=0)]
                frames = slice(group.frame, group.frame + group.length)
                owners[row, frames, group.places] = torch.where(into < 0, -1, places)
                weights[row, frames, group.places] = share / group.length
    totals = [sum(shares) for shares in counts]
    return plan_of(video, newlines, owners.flatten(1), weights.flatten(1), totals)


def plan_of(
    video: Frames,
    newlines: Int[Tensor, "m"],
    owner: Int[Tensor, "B Ft"],
    weight: Float[Tensor, "B Ft"],
    counts: Sequence[int],
) -> TokenPlan:
    """Make the plan, with newlines as they are; ragged where videos keep different counts.

    Args:
        video: Where the frames lie.
        newlines: Those that stay.
        owner: Of each token, -1 for none.
        weight: Of each token in its owner's new value.
        counts: Tokens that each video keeps, without newlines.
    """
    places = video.places.flatten()
    total = len(places) + len(video.newlines)
    whole = torch.full((len(owner), total), -1, dtype=torch.int64, device=owner.device)
    whole[:, places] = torch.where(owner < 0, -1, places[owner.clamp(min=0)])
    whole[:, newlines] = newlines
    shares = torch.ones(whole.shape, device=owner.device)
    shares[:, places] = weight
    totals = [count + len(newlines) for count in counts]
    keep, slots = kept_and_slots(whole, max(totals))
    return TokenPlan(keep=ragged(keep, totals), assign=slots, weight=shares)
