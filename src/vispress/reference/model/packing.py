"""Many questions behind one prefix of pictures: packed training that equals asking one by one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from vispress.reference.model.architecture import Architecture
from vispress.reference.model.dense import DenseBatch
from vispress.reference.world.questions import mixture
from vispress.reference.world.scenes import NUM_PATCHES, draw_scene
from vispress.reference.world.words import BOS, EOS, IMAGE, PAD, WORD_ID, QuestionKind

SLOT: Final = 32  # tokens that share a block of attention

# scenes of stage 1 are not seen again
_OFFSET: Final = 1 << 32

QUOTA: Final[dict[QuestionKind, int]] = {
    "attribute": 3,
    "place": 2,
    "existence": 5,
    "needle": 5,
    "digit": 3,
    "reading": 1,
    "where": 5,
    "relation": 6,
    "count": 5,
}

Thread = tuple[tuple[str, str], ...]
"""Turns of one conversation, (question, answer) each; a lone question is a thread of one."""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """B packed sequences of length L = P + W * S: a prefix, then S slots of W tokens.

    Args:
        pixels: Pictures of all rows in the order of their visual tokens, uint8, shape
            (B * images, height, width, 3); or a clip a row, (B, frames, height, width, 3).
        input_ids: int64, shape (B, L).
        position_ids: What each token's position would be if its thread stood alone, (B, L), or
            (3, B, L) for models that count in time, rows and columns.
        group: Number of the thread a token belongs to; -1 in the prefix, -2 padding; (B, L).
        labels: Token to predict at each position, -100 for none, (B, L).
        early: Likewise, for the first answer word asked too early, (B, L).
        prefix: P, tokens that every thread of a row sees.
        width: W.
        dense: Dense labels of the pictures, where the vision side is supervised too.
    """

    pixels: Tensor
    input_ids: Tensor
    position_ids: Tensor
    group: Tensor
    labels: Tensor
    early: Tensor
    prefix: int
    width: int = SLOT
    dense: DenseBatch | None = None

    def to(self, device: torch.device) -> "PackedBatch":
        """Move the batch to another device."""
        values = [getattr(self, field.name) for field in fields(self)]
        return PackedBatch(*(v.to(device) if hasattr(v, "to") else v for v in values))

    def at(self, positions: NDArray[np.int64] | None) -> "PackedBatch":
        """Copy the batch with its prefix at positions in time, rows and columns, (3, P), if any."""
        if positions is None:
            return self
        ids = self.position_ids.repeat(3, 1, 1)
        ids[:, :, : self.prefix] = torch.from_numpy(positions)[:, None]
        return replace(self, position_ids=ids)

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Make the additive mask within slots, (B, S, W, W): causal, and only one's own thread."""
        group = torch.unflatten(self.group[:, self.prefix :], 1, (-1, self.width))
        same = group[..., :, None] == group[..., None, :]
        order = torch.arange(self.width, device=group.device)
        allowed = same & (order[:, None] >= order[None, :])
        out = torch.zeros(allowed.shape, dtype=dtype, device=group.device)
        return out.masked_fill_(~allowed, -1e30)


def stack(
    pixels: Tensor,
    rows: Sequence[NDArray[np.int64]],
    *,
    prefix: int,
    width: int = SLOT,
    dense: DenseBatch | None = None,
) -> PackedBatch:
    """Stack rows that `pack` laid out; the other arguments are fields of the batch."""
    ids, positions, group, labels, early = torch.from_numpy(np.stack(rows, axis=1)).unbind()
    return PackedBatch(pixels, ids, positions, group, labels, early, prefix, width, dense)


def prefix_ids(text: str = IMAGE, visual: int = NUM_PATCHES) -> list[int]:
    """Make the token ids of a prefix, equal to the processor's.

    Args:
        text: Words and `<image>` marks.
        visual: Visual tokens a picture.

    Returns:
        `<s>` and the words, every mark repeated `visual` times.
    """
    ids = [WORD_ID[BOS]]
    for word in text.split():
        ids += [WORD_ID[word]] * (visual if word == IMAGE else 1)
    return ids


def pack(
    threads: Sequence[Thread],
    slots: int,
    *,
    prefix: Sequence[int] | None = None,
    start: int | None = None,
    width: int = SLOT,
) -> NDArray[np.int64]:
    """Lay threads out in slots, each in the first slot with room.

    Args:
        threads: In order; those that fit nowhere are left out. Within a thread, a later turn
            follows the earlier answer directly: the end token is predicted, never read.
        slots: Number of slots S.
        prefix: Token ids of the prefix; one picture by default.
        start: Position of the first token behind the prefix; its length by default.
        width: Tokens a slot.

    Returns:
        int64 rows (ids, positions, group, labels, early), shape (5, P + W * S).
    """
    head = prefix_ids() if prefix is None else list(prefix)
    size = len(head)
    out = np.full((5, size + width * slots), -100, dtype=np.int64)
    out[0], out[1], out[2] = WORD_ID[PAD], 0, -2
    out[0, :size], out[1, :size], out[2, :size] = head, np.arange(size), -1
    used = [0] * slots
    for number, thread in enumerate(threads):
        ids, labels, early = _lay(thread)
        slot = next((i for i, u in enumerate(used) if u + len(ids) <= width), None)
        if slot is None:
            continue
        at = size + width * slot + used[slot]
        used[slot] += len(ids)
        place = slice(at, at + len(ids))
        out[0, place], out[3, place], out[4, place] = ids, labels, early
        out[1, place] = (size if start is None else start) + np.arange(len(ids))
        out[2, place] = number
    return out


def _lay(thread: Thread) -> tuple[list[int], list[int], list[int]]:
    """Lay out ids, labels and early labels of one thread."""
    ids: list[int] = []
    labels: list[int] = []
    early: list[int] = []
    for text, right in thread:
        words = [WORD_ID[w] for w in text.split()]
        answer = [WORD_ID[w] for w in right.split()]
        ids += words + answer
        labels += [-100] * (len(words) - 1) + [*answer, WORD_ID[EOS]]
        # the last content word and the question mark, but never what belongs to another question
        soon = min(2, len(words) - 1)
        early += [-100] * (len(words) - 1 - soon) + [answer[0]] * soon
        early += [-100] * (1 + len(answer))
    return ids, labels, early


class LanguageStream(Dataset[PackedBatch]):
    """Batch number -> freshly drawn scenes with packed questions.

    Args:
        architecture: Decides the form of pictures, labels and prefix.
        seed: Seed of scenes and questions.
        batch: Scenes a batch.
        slots: Slots of 32 text tokens a scene.
        easy: The first so many images show fewer objects.
        together: Consecutive batches that make one training step.
        offset: Number of the first scene.
    """

    def __init__(
        self,
        architecture: Architecture,
        seed: int,
        batch: int,
        slots: int,
        easy: int,
        together: int = 1,
        *,
        offset: int = _OFFSET,
    ) -> None:
        self.architecture = architecture
        self.seed = seed
        self.batch = batch
        self.slots = slots
        self.easy = easy
        self.together = together
        self.offset = offset

    def __getitem__(self, number: int) -> PackedBatch:
        scenes, asked = [], []
        for index in range(number * self.batch, (number + 1) * self.batch):
            busy = 1.0 if index >= self.easy else 0.5 + 0.5 * index / self.easy
            scene = draw_scene(self.seed, "train", self.offset + index, busy=busy)
            rng = np.random.default_rng((self.seed, 2, index))
            scenes.append(scene)
            asked.append([((q.text, q.answer),) for q in mixture(scene, rng, QUOTA)])
        dense = self.architecture.collate(scenes, self.seed, number // self.together)
        prefix = self.architecture.prefix(math.isqrt(dense.what.shape[1]))
        rows = [pack(a, self.slots, prefix=prefix.ids, start=prefix.after) for a in asked]
        batch = stack(dense.pixels, rows, prefix=len(prefix.ids), dense=dense)
        return batch.at(prefix.positions)
