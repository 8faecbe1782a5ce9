"""Dense supervision of the vision side: what every patch shows, read out in the model's own words.

The heads exist only while training; nothing of them is shipped.
"""

from dataclasses import dataclass, fields
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vispress.reference.scenes import GRID, NUM_PATCHES, Scene
from vispress.reference.words import (
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
    """Pixels and dense labels of B scenes.

    Args:
        pixels: uint8, shape (B, 96, 96, 3).
        what: Index into `WHAT_WORDS`, int64, shape (B, 144).
        color: Index into `COLOR_WORDS`, int64, shape (B, 144).
        dot: Index into `DOT_WORDS`, int64, shape (B, 144).
        center: 1 at the centre of an item, int64, shape (B, 144).
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
        """The same batch on another device."""
        return DenseBatch(*(getattr(self, f.name).to(device) for f in fields(self)))


def collate(scenes: list[Scene]) -> DenseBatch:
    """Stack scenes into a batch."""
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


def _ids(words: tuple[str, ...]) -> Tensor:
    return torch.tensor([WORD_ID[w] for w in words])


class DenseHeads(nn.Module):
    """Reads names, colours and places of patches from projected features.

    Names, colours and thirds are dot products with the language model's own word embeddings, so
    that the features arrive where the words already are; fine places, item centres and [CLS]
    content have linear heads.

    Args:
        text_width: Width of the projected features.
        vision_width: Width of the vision encoder.
    """

    what_ids: Tensor
    color_ids: Tensor
    dot_ids: Tensor
    place_ids: Tensor
    row_of: Tensor
    column_of: Tensor

    def __init__(self, text_width: int, vision_width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(text_width, elementwise_affine=False, eps=1e-6)
        self.scale = nn.Parameter(torch.tensor(4.0))
        self.dot_map = nn.Linear(text_width, text_width, bias=False)
        self.fine = nn.Linear(text_width, 2 * GRID + 2)
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
        at = torch.arange(NUM_PATCHES)
        self.register_buffer("row_of", at // GRID, persistent=False)
        self.register_buffer("column_of", at % GRID, persistent=False)

    def forward(
        self, features: Tensor, cls: Tensor, last: Tensor, embeddings: Tensor, batch: DenseBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and accuracies.

        Args:
            features: Projected features, shape (B, 144, D).
            cls: [CLS] state of the feature layer, shape (B, Dv).
            last: [CLS] state of the last layer, shape (B, Dv).
            embeddings: The word embeddings, shape (V, D).
            batch: The labels.

        Returns:
            The scalar loss and detached scalars: accuracy of names, colours and dots on patches
            that have one, and of content.
        """
        x = self.norm(features.float())
        scaled = x * self.scale
        words = embeddings.float()
        what = scaled @ words[self.what_ids].T
        color = scaled @ words[self.color_ids].T
        dot = self.dot_map(scaled).float() @ words[self.dot_ids].T
        place = scaled @ words[self.place_ids].T
        fine = self.fine(x).float()
        content = [
            self.cls(self.cls_norm(cls.float())).float(),
            self.last(self.last_norm(last.float())).float(),
        ]
        loss = (
            _weighted(what, batch.what, 0.15)
            + _weighted(color, batch.color, 0.15)
            + _weighted(dot, batch.dot, 0.03)
            + 0.3 * self._place_loss(place, fine)
            + 0.5 * _weighted(fine[..., -2:], batch.center, 0.2)
            + sum(F.binary_cross_entropy_with_logits(c, batch.content) for c in content)
        )
        with torch.no_grad():
            scores = {
                "what": _hits(what, batch.what),
                "color": _hits(color, batch.color),
                "dot": _hits(dot, batch.dot),
                "center": _hits(fine[..., -2:], batch.center),
                "content": ((content[0] > 0) == (batch.content > 0.5)).float().mean(),
            }
        return loss, scores

    def _place_loss(self, place: Tensor, fine: Tensor) -> Tensor:
        """Cross entropy of thirds (against words) and of exact row and column."""
        rows = self.row_of.expand(place.shape[:2])
        columns = self.column_of.expand(place.shape[:2])
        third = GRID // 3
        losses = (
            F.cross_entropy(place[..., :3].flatten(0, 1), (rows // third).flatten()),
            F.cross_entropy(place[..., 3:].flatten(0, 1), (columns // third).flatten()),
            F.cross_entropy(fine[..., :GRID].flatten(0, 1), rows.flatten()),
            F.cross_entropy(fine[..., GRID : 2 * GRID].flatten(0, 1), columns.flatten()),
        )
        return torch.stack(losses).sum()


def _weighted(logits: Tensor, target: Tensor, background: float) -> Tensor:
    """Cross entropy with class 0 weighted down."""
    weight = torch.ones(logits.shape[-1], device=logits.device)
    weight[0] = background
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), weight=weight)


def _hits(logits: Tensor, target: Tensor) -> Tensor:
    """Accuracy where the label is not background."""
    mask = target > 0
    return ((logits.argmax(-1) == target) & mask).sum() / mask.sum().clamp(min=1)
