"""Many questions behind one set of visual tokens: packed training that equals asking one by one."""

from dataclasses import dataclass, fields
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from vispress.reference.attention import PREFIX
from vispress.reference.dense import DenseBatch, collate
from vispress.reference.questions import Question, mixture
from vispress.reference.scenes import draw_scene
from vispress.reference.words import BOS, EOS, IMAGE, PAD, WORD_ID, QuestionKind

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
    """B packed sequences of length L = 145 + 32 * S.

    Args:
        dense: Pixels and dense labels.
        input_ids: int64, shape (B, L).
        position_ids: What each token's position would be if its question stood alone, (B, L).
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
        group = torch.unflatten(self.group[:, PREFIX:], 1, (-1, SLOT))
        same = group[..., :, None] == group[..., None, :]
        order = torch.arange(SLOT, device=group.device)
        allowed = same & (order[:, None] >= order[None, :])
        out = torch.zeros(allowed.shape, dtype=dtype, device=group.device)
        return out.masked_fill_(~allowed, -1e30)


def pack(questions: list[Question], slots: int) -> NDArray[np.int64]:
    """Lay questions out in slots of 32 tokens, each in the first slot with room.

    Args:
        questions: In order; those that fit nowhere are left out.
        slots: Number of slots S.

    Returns:
        int64 rows (ids, positions, group, labels, early), shape (5, 145 + 32 * S).
    """
    out = np.full((5, PREFIX + SLOT * slots), -100, dtype=np.int64)
    out[0], out[1], out[2] = WORD_ID[PAD], 0, -2
    out[0, 0], out[0, 1:PREFIX] = WORD_ID[BOS], WORD_ID[IMAGE]
    out[1, :PREFIX], out[2, :PREFIX] = np.arange(PREFIX), -1
    used = [0] * slots
    for number, question in enumerate(questions):
        words = [WORD_ID[w] for w in question.text.split()]
        answer = [WORD_ID[w] for w in question.answer.split()]
        size = len(words) + len(answer)
        slot = next((i for i, u in enumerate(used) if u + size <= SLOT), None)
        if slot is None:
            continue
        at = PREFIX + SLOT * slot + used[slot]
        used[slot] += size
        here = slice(at, at + size)
        out[0, here] = words + answer
        out[1, here] = PREFIX + np.arange(size)
        out[2, here] = number
        colon = at + len(words) - 1
        out[3, colon : at + size] = [*answer, WORD_ID[EOS]]
        # the last content word and the question mark
        out[4, colon - 2 : colon] = answer[0]
    return out


class LanguageStream(Dataset[PackedBatch]):
    """Batch number -> freshly drawn scenes with packed questions.

    Args:
        seed: Seed of scenes and questions.
        batch: Scenes a batch.
        slots: Slots of 32 text tokens a scene.
        easy: The first so many images show fewer objects.
    """

    def __init__(self, seed: int, batch: int, slots: int, easy: int) -> None:
        self.seed = seed
        self.batch = batch
        self.slots = slots
        self.easy = easy

    def __getitem__(self, step: int) -> PackedBatch:
        scenes, rows = [], []
        for index in range(step * self.batch, (step + 1) * self.batch):
            busy = 1.0 if index >= self.easy else 0.5 + 0.5 * index / self.easy
            scene = draw_scene(self.seed, "train", _OFFSET + index, busy=busy)
            rng = np.random.default_rng((self.seed, 2, index))
            scenes.append(scene)
            rows.append(pack(mixture(scene, rng, QUOTA), self.slots))
        parts = torch.from_numpy(np.stack(rows, axis=1))
        return PackedBatch(collate(scenes), *parts.unbind())
