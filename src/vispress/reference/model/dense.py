"""Dense supervision of the vision side: what every patch shows, read out in the model's own words.

The heads exist only while training; nothing of them is shipped.
"""

import math
from dataclasses import dataclass, fields
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vispress.reference.world.scenes import GRID, Scene
from vispress.reference.world.words import (
    COLOR_WORDS,
    COLORS,
    COLUMNS,
    DIGITS,
    DOT_WORDS,
    ROWS,
    SHAPES,
    WHAT_WORDS,
    WORD_ID,
)

NUM_CONTENT: Final = len(SHAPES) + len(COLORS) + len(DIGITS) + 1


@dataclass(frozen=True, slots=True)
class DenseBatch:
    """Pixels and dense labels of B scenes, of N = n * n visual tokens each.

    Args:
        pixels: uint8, shape (B, S, S, 3).
        what: Index into `WHAT_WORDS`, int64, shape (B, N).
        color: Index into `COLOR_WORDS`, int64, shape (B, N).
        dot: Index into `DOT_WORDS`, int64, shape (B, N).
        center: 1 at the centre of an item, int64, shape (B, N).
        content: What the scene holds, multi-hot fp32, shape (B, 27): shapes, their colours,
            handwritten digits, a sign.
    """

    pixels: Tensor
    what: Tensor
    color: Tensor
    dot: Tensor
    center: Tensor
    content: Tensor

    def to(self, device: torch.device) -> "DenseBatch":
        """Move the batch to another device."""
        return DenseBatch(*(getattr(self, f.name).to(device) for f in fields(self)))


def collate(scenes: list[Scene]) -> DenseBatch:
    """Stack scenes into a batch: S is 96 and N the 144 patches."""
    content = np.zeros((len(scenes), NUM_CONTENT), dtype=np.float32)
    for row, scene in zip(content, scenes, strict=True):
        for item in scene.items:
            if item.kind == "shape":
                row[item.value] = row[len(SHAPES) + item.color] = 1
            elif item.kind == "digit":
                row[len(SHAPES) + len(COLORS) + item.value] = 1
            else:
                row[-1] = 1
    what, color, dot, center = (
        torch.from_numpy(np.stack([getattr(s, k) for s in scenes]).astype(np.int64))
        for k in ("what", "color", "dot", "center")
    )
    pixels = torch.from_numpy(np.stack([s.pixels for s in scenes]))
    return DenseBatch(pixels, what, color, dot, center, torch.from_numpy(content))


@dataclass(frozen=True, slots=True)
class Seen:
    """A model's view of a batch of pictures, as far as the dense heads read it.

    Args:
        features: Projected features, shape (B, N, D).
        places: States of the visual tokens that know where they are, shape (B, N, D); None where
            none do: without a table of positions, only the language model's do.
        cls: [CLS] state of the feature layer, shape (B, Dv); None without [CLS].
        last: [CLS] state of the last layer, likewise.
    """

    features: Tensor
    places: Tensor | None = None
    cls: Tensor | None = None
    last: Tensor | None = None


def _ids(words: tuple[str, ...]) -> Tensor:
    return torch.tensor([WORD_ID[w] for w in words])


class DenseHeads(nn.Module):
    """Reads names, colours and places of patches from projected features.

    Names, colours and thirds are dot products with the language model's own word embeddings, so
    that the features arrive where the words already are; fine places, item centres and [CLS]
    content have linear heads.

    Args:
        text_width: Width of the projected features.
        vision_width: Width of the vision encoder; None without [CLS].
        place_weight: Weight of the loss of places.
    """

    what_ids: Tensor
    color_ids: Tensor
    dot_ids: Tensor
    place_ids: Tensor

    def __init__(
        self, text_width: int, vision_width: int | None, *, place_weight: float = 0.3
    ) -> None:
        super().__init__()
        self.place_weight = place_weight
        self.norm = nn.RMSNorm(text_width, elementwise_affine=False, eps=1e-6)
        self.scale = nn.Parameter(torch.tensor(4.0))
        self.dot_map = nn.Linear(text_width, text_width, bias=False)
        self.fine = nn.Linear(text_width, 2 * GRID + 2)
        if vision_width is not None:
            self.cls_norm = nn.LayerNorm(vision_width)
            self.cls = nn.Linear(vision_width, NUM_CONTENT)
            self.last_norm = nn.LayerNorm(vision_width)
            self.last = nn.Linear(vision_width, NUM_CONTENT)
        for name, words in (
            ("what", WHAT_WORDS),
            ("color", COLOR_WORDS),
            ("dot", DOT_WORDS),
            ("place", ROWS + COLUMNS),
        ):
            self.register_buffer(f"{name}_ids", _ids(words), persistent=False)

    def forward(
        self, seen: Seen, embeddings: Tensor, batch: DenseBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute loss and accuracies.

        Args:
            seen: What the model makes of the batch's pixels.
            embeddings: The word embeddings, shape (V, D).
            batch: The labels.

        Returns:
            The scalar loss and detached scalars: accuracy of names, colours and dots on tokens
            that have one; of rows and columns where places are known; of content with [CLS].
        """
        x = self.norm(seen.features.float())
        scaled = x * self.scale
        words = embeddings.float()
        what = scaled @ words[self.what_ids].T
        color = scaled @ words[self.color_ids].T
        dot = self.dot_map(scaled).float() @ words[self.dot_ids].T
        center = self.fine(x).float()[..., -2:]
        loss = (
            _weighted(what, batch.what, 0.15)
            + _weighted(color, batch.color, 0.15)
            + _weighted(dot, batch.dot, 0.03)
            + 0.5 * _weighted(center, batch.center, 0.2)
        )
        scores = {
            "what": _hits(what, batch.what),
            "color": _hits(color, batch.color),
            "dot": _hits(dot, batch.dot),
            "center": _hits(center, batch.center),
        }
        if seen.places is not None:
            placed, scores["place"] = self._place_loss(self.norm(seen.places.float()), words)
            loss = loss + self.place_weight * placed
        if seen.cls is not None and seen.last is not None:
            content = [
                self.cls(self.cls_norm(seen.cls.float())).float(),
                self.last(self.last_norm(seen.last.float())).float(),
            ]
            for logits in content:
                loss = loss + F.binary_cross_entropy_with_logits(logits, batch.content)
            hits = (content[0] > 0) == (batch.content > 0.5)
            scores["content"] = hits.float().mean().detach()
        return loss, scores

    def _place_loss(self, x: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Compute cross entropy of thirds (by words) and twelfths, and accuracy of the latter."""
        place = (x * self.scale) @ words[self.place_ids].T
        fine = self.fine(x).float()
        side = math.isqrt(x.shape[1])
        middle = (torch.arange(side, device=x.device) + 0.5) / side
        losses, hits = [], []
        for axis in (0, 1):
            at = middle[:, None].expand(-1, side) if axis == 0 else middle.expand(side, -1)
            at = at.expand(len(x), -1, -1).flatten()
            third = place[..., 3 * axis : 3 * axis + 3].flatten(0, 1)
            exact = fine[..., GRID * axis : GRID * (axis + 1)].flatten(0, 1)
            losses.append(F.cross_entropy(third, (at * 3).long()))
            losses.append(F.cross_entropy(exact, (at * GRID).long()))
            hits.append((exact.argmax(-1) == (at * GRID).long()).float().mean())
        return torch.stack(losses).sum(), torch.stack(hits).mean().detach()


def _weighted(logits: Tensor, target: Tensor, background: float) -> Tensor:
    """Compute cross entropy with class 0 weighted down."""
    weight = torch.ones(logits.shape[-1], device=logits.device)
    weight[0] = background
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), weight=weight)


def _hits(logits: Tensor, target: Tensor) -> Tensor:
    """Compute accuracy where the label is not background."""
    mask = target > 0
    return (((logits.argmax(-1) == target) & mask).sum() / mask.sum().clamp(min=1)).detach()
