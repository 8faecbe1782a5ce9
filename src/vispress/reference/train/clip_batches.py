"""Training batches of the Qwen reference's stage 3: clips, and replayed single pictures in turn."""

from dataclasses import replace
from typing import Final, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from vispress.reference.model.architecture import QwenReference
from vispress.reference.model.packing import LanguageStream, PackedBatch, pack, stack
from vispress.reference.model.qwen import TOKEN
from vispress.reference.world.clips import STEPS, Clip, show_clip
from vispress.reference.world.scenes import IMAGE_SIZE

ClipLayout = Literal["single", "clip"]
ROUND: Final[tuple[ClipLayout, ...]] = ("clip", "single")
SINGLES: Final = 2  # pictures of a step that replays, for each clip of the others

# scenes of the other stages are not seen again
_OFFSET: Final = 5 << 32
_SLOTS: Final = 5
_WIDE: Final = 48  # tokens a slot: four questions
# forms as slots are filled with them: how often each counts, and how many are taken at most
_TAKEN: Final = {
    "changed": (3, 1),
    "last": (2, 1),
    "order": (1, 5),
    "first": (1, 1),
    "visit": (1, 4),
    "late": (1, 2),
    "other": (1, 8),
}


class ClipStream(Dataset[PackedBatch]):
    """Batch number -> clips with packed questions, or single pictures as in stage 2.

    Args:
        architecture: Decides the form of prefixes.
        seed: Seed of clips, scenes and questions.
        batch: Clips a batch; batches of single pictures have `SINGLES` times as many.
        slots: Slots of 32 text tokens a single picture.
        world: Processes; their batches of one step have one layout.
    """

    def __init__(
        self, architecture: QwenReference, seed: int, batch: int, slots: int, world: int
    ) -> None:
        self.architecture = architecture
        self.seed = seed
        self.batch = batch
        self.world = world
        self.singles = LanguageStream(
            architecture, seed, SINGLES * batch, slots, 0, world, offset=_OFFSET
        )

    def layout(self, number: int) -> ClipLayout:
        """Name the layout of a batch."""
        return ROUND[number // self.world % len(ROUND)]

    def __getitem__(self, number: int) -> PackedBatch:
        if self.layout(number) == "single":
            return replace(self.singles[number], dense=None)
        first = number * self.batch
        clips = [show_clip(self.seed, "train", first + i) for i in range(self.batch)]
        prefix = self.architecture.clip_prefix(STEPS, IMAGE_SIZE // TOKEN)
        rows = [
            pack(_threads(c), _SLOTS, prefix=prefix.ids, start=prefix.after, width=_WIDE)
            for c in clips
        ]
        frames = torch.from_numpy(np.stack([clip.frames for clip in clips]))
        batch = stack(frames, rows, prefix=len(prefix.ids), width=_WIDE)
        return batch.at(prefix.positions)


def _threads(clip: Clip) -> list[tuple[tuple[str, str], ...]]:
    """Choose questions of a clip; what finds no room is left out."""
    asked: list[tuple[tuple[str, str], ...]] = []
    for form, (weight, most) in _TAKEN.items():
        for q in [q for q in clip.asked if q.form == form][:most]:
            asked += [((q.text, q.answer),)] * weight
    return asked
