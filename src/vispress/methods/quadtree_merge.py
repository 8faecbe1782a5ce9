"""Quadtree merge: neighbouring tokens that are alike become their mean, again and again.

After the "divide" step of Wang et al., "Divide, Conquer and Combine: A Training-Free Framework for
High-Resolution Image Perception in Multimodal Large Language Models", AAAI 2025, arXiv:2408.15556.
Source: the authors' code (DreamMr/HR-Bench b17b199, no licence) and its vectors; it merges crops of
pixels, not tokens.
Follows: quarters within a cosine distance of 0.1 become one, five levels deep. `linkage="average"`
clusters the parts of a cell as the code does its quarters: agglomeratively, by the mean distance
between two clusters, so that two or three of four merge, too.
Differs: tokens of a 2 x 2 cell in place of quarters of a picture and their CLIP features, from the
smallest cells up, where the code divides from the whole picture down; odd edges stay (the code
loses them); a mean is of its parts, which at an edge may be fewer than four. By default (ours)
every two parts of a cell must be alike, and it merges whole or not at all: the code's partition in
only one cell of five.
Reconstructed: all of the token-level method; a mean stands at its first token; with a budget the
cheapest cells are merged, however deep, until it is met (up to two tokens less remain).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from vispress.checks import check_choice, check_integer, check_number
from vispress.devices import sent
from vispress.errors import ConfigError
from vispress.methods._parts.clustering.owners import kept_and_slots, ragged
from vispress.methods._parts.geometry.grids import Raster, rasters, signals_for
from vispress.methods._parts.geometry.quadtree import costs, linked_cells, merged_cells, tree_of
from vispress.methods._parts.geometry.segments import Part
from vispress.methods.base import Compressor, Evidence, upcast
from vispress.registry import register_method
from vispress.types import Placement, Signal, TokenPlan, VisualTokens


@final
@register_method("quadtree_merge")
@dataclass(frozen=True, kw_only=True)
class QuadtreeMerge(Compressor):
    """Merge before the LLM, by likeness of neighbours; without a budget the image decides how far.

    Args:
        theta: Without a budget: cosine distance that all parts of a merged cell stay below.
        linkage: Parts of a cell merge together, `"complete"`, or in clusters, `"average"`: those
            whose mean distance is at most `theta`. The latter takes no budget.
        max_depth: Without a budget: levels merged at most; five are cells of 32 x 32 tokens.
    """

    summary: ClassVar[str] = "means of neighbours that are alike, cell by cell"
    paper: ClassVar[str] = "Wang et al., AAAI 2025, arXiv:2408.15556"
    evidence: ClassVar[Evidence] = "reconstructed"
    reads: ClassVar[frozenset[Signal]] = signals_for("features")
    whole: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    merges: ClassVar[bool] = True
    adaptive: ClassVar[bool] = True
    """Counts hang on the image, with a budget too."""

    theta: float = 0.1
    linkage: Literal["complete", "average"] = "complete"
    max_depth: int = 5

    def validate(self) -> None:
        check_choice("linkage", self.linkage, ("complete", "average"))
        if self.linkage == "average" and not self.unbudgeted:
            raise ConfigError(
                "linkage='average' takes no budget, theta alone decides; leave the budget out, or "
                "say linkage='complete'"
            )
        check_number("theta", self.theta, low=0.0, high=2.0)
        check_integer("max_depth", self.max_depth, low=1)

    def uncapturable(self) -> str:
        return "images decide how many cells are left"

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return self.before_llm(num_layers)

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        found, newlines = rasters(tokens, num_keep)
        linked = self.linkage == "average" and num_keep >= tokens.num_visual
        device = tokens.features.device
        owner = torch.full((tokens.batch, tokens.num_visual), -1, device=device)
        weight = torch.ones(owner.shape, device=device)
        if len(newlines):
            lines = sent(newlines, device)
            owner[:, lines] = lines
        alike: dict[tuple[int, int], list[Raster]] = {}
        for raster in found:
            alike.setdefault(raster.size, []).append(raster)
        for size, group in alike.items():  # worked on at once
            places = torch.stack([raster.places.flatten() for raster in group])
            part = Part(slice(None), sent(places, device), sum(raster.share for raster in group))
            shares = torch.tensor([raster.share for raster in group] * tokens.batch)
            x = upcast(part.of(tokens.features))
            into, own = self.cells(x, size, sent(shares, device), linked=linked)
            owner[:, part.places], weight[:, part.places] = part.tokens(into), part.shaped(own)
        # waits once for the device: images decide how many cells are left
        counts = (owner == torch.arange(tokens.num_visual, device=device)).sum(dim=1).tolist()
        keep, slots = kept_and_slots(owner, max(counts))
        return TokenPlan(keep=ragged(keep, counts), assign=slots, weight=weight)

    def cells(
        self, x: Tensor, size: tuple[int, int], shares: Tensor, *, linked: bool
    ) -> tuple[Tensor, Tensor]:
        """Find the token that each token of a raster goes to, and its weight there."""
        places = torch.arange(x.shape[1], device=x.device)
        if len(places) == 1:
            return places.expand(x.shape[:2]), torch.ones(x.shape[:2], device=x.device)
        if linked:
            return linked_cells(x, size, self.theta, self.max_depth)
        tree, theta = tree_of(size), self.theta if self.unbudgeted else 0.0
        cost = costs(x, size)
        chosen = merged_cells(cost, tree, shares, theta, self.max_depth)
        merged = chosen[:, sent(tree.cell, x.device)]
        # the parts of a merged cell are merged, too: its first token is the earliest of theirs
        owner = torch.where(merged, sent(tree.first, x.device), places).amin(dim=1)
        parts = torch.where(merged, sent(tree.parts, x.device), 1).prod(dim=1)
        return owner, parts.reciprocal()
