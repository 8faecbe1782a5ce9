"""Many questions behind one set of visual tokens: packed training that equals asking one by one."""

import math
from dataclasses import dataclass, fields
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from vispress.reference.architecture import Architecture, Prefix
from vispress.reference.dense import DenseBatch
from vispress.reference.questions import Question, mixture
from vispress.reference.scenes import draw_scene
from vispress.reference.words import EOS, PAD, WORD_ID, QuestionKind

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


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """B packed sequences of length L = P + 32 * S, after a prefix of P tokens.

    Args:
        dense: Pixels and dense labels.
        input_ids: int64, shape (B, L).
        position_ids: What each token's position would be if its question stood alone, (B, L);
            (3, B, L) with M-RoPE.
        group: Number of the question a token belongs to; -1 in the prefix, -2 padding; (B, L).
        labels: Token to predict at each position, -100 for none, (B, L).
        early: Likewise, for the first answer word asked too early, (B, L).
    """

    dense: DenseBatch
    input_ids: Tensor
    position_ids: Tensor
    group: Tensor
    labels: Tensor
    early: Tensor

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch on another device."""
        return PackedBatch(*(getattr(self, f.name).to(device) for f in fields(self)))

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Additive mask within slots, shape (B, S, W, W): causal, and only one's own question."""
        first = int((self.group[0] == -1).sum())
        group = torch.unflatten(self.group[:, first:], 1, (-1, SLOT))
        same = group[..., :, None] == group[..., None, :]
        order = torch.arange(SLOT, device=group.device)
        allowed = same & (order[:, None] >= order[None, :])
        out = torch.zeros(allowed.shape, dtype=dtype, device=group.device)
        return out.masked_fill_(~allowed, -1e30)


def pack(questions: list[Question], slots: int, prefix: Prefix) -> NDArray[np.int64]:
    """Lay questions out in slots of 32 tokens, each in the first slot with room.

    Args:
        questions: In order; those that fit nowhere are left out.
        slots: Number of slots S.
        prefix: What stands before them, P tokens.

    Returns:
        int64 rows (ids, group, labels, early, positions...), shape (4 + M, P + 32 * S), where M is
        the prefix's number of position axes.
    """
    first = len(prefix.ids)
    out = np.full((4 + len(prefix.positions), first + SLOT * slots), -100, dtype=np.int64)
    out[0], out[1], out[4:] = WORD_ID[PAD], -2, 0
    out[0, :first], out[1, :first], out[4:, :first] = prefix.ids, -1, prefix.positions
    used = [0] * slots
    for number, question in enumerate(questions):
        words = [WORD_ID[w] for w in question.text.split()]
        answer = [WORD_ID[w] for w in question.answer.split()]
        size = len(words) + len(answer)
        slot = next((i for i, u in enumerate(used) if u + size <= SLOT), None)
        if slot is None:
            continue
        at = first + SLOT * slot + used[slot]
        used[slot] += size
        here = slice(at, at + size)
        out[0, here] = words + answer
        out[1, here] = number
        colon = at + len(words) - 1
        out[2, colon : at + size] = [*answer, WORD_ID[EOS]]
        # the last content word and the question mark
        out[3, colon - 2 : colon] = answer[0]
        out[4:, here] = prefix.after + np.arange(size)
    return out


class LanguageStream(Dataset[PackedBatch]):
    """Batch number -> freshly drawn scenes with packed questions.

    Args:
        architecture: Decides the form of a batch.
        seed: Seed of scenes and questions.
        batch: Scenes a batch.
        slots: Slots of 32 text tokens a scene.
        easy: The first so many images show fewer objects.
        together: Consecutive batches that make one training step.
    """

    def __init__(
        self,
        architecture: Architecture,
        seed: int,
        batch: int,
        slots: int,
        easy: int,
        together: int = 1,
    ) -> None:
        self.architecture = architecture
        self.seed = seed
        self.batch = batch
        self.slots = slots
        self.easy = easy
        self.together = together

    def __getitem__(self, number: int) -> PackedBatch:
        scenes, asked = [], []
        for index in range(number * self.batch, (number + 1) * self.batch):
            busy = 1.0 if index >= self.easy else 0.5 + 0.5 * index / self.easy
            scene = draw_scene(self.seed, "train", _OFFSET + index, busy=busy)
            rng = np.random.default_rng((self.seed, 2, index))
            scenes.append(scene)
            asked.append(mixture(scene, rng, QUOTA))
        dense = self.architecture.collate(scenes, self.seed, number // self.together)
        prefix = self.architecture.prefix(math.isqrt(dense.what.shape[1]))
        rows = [pack(questions, self.slots, prefix) for questions in asked]
        ids, group, labels, early, *positions = torch.from_numpy(np.stack(rows, axis=1))
        at = positions[0] if len(positions) == 1 else torch.stack(positions)
        return PackedBatch(dense, ids, at, group, labels, early)
