"""Training batches of stage 3: every step has one layout, and layouts follow a fixed round."""

from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from vispress.reference.model.packing import PackedBatch, Thread, pack, prefix_ids, stack
from vispress.reference.world.episodes import Shown, converse, show_examples, show_pair
from vispress.reference.world.questions import mixture
from vispress.reference.world.scenes import GRID, PATCH_SIZE, draw_scene
from vispress.reference.world.videos import show_video
from vispress.reference.world.words import WORD_ID, QuestionKind

Layout = Literal["single", "talk", "small", "compare", "in_context", "video"]

# half of the steps replay single pictures, so that the old kinds do not fall
ROUND: Final[tuple[Layout, ...]] = (
    "single",
    "video",
    "in_context",
    "single",
    "compare",
    "single",
    "video",
    "talk",
    "video",
    "single",
    "video",
    "small",
    "single",
    "compare",
    "video",
    "single",
    "in_context",
    "talk",
    "video",
    "single",
)
# share of a step's pictures that a row takes
COST: Final[dict[Layout, int]] = {
    "single": 1,
    "talk": 2,
    "small": 2,
    "compare": 2,
    "in_context": 3,
    "video": 3,
}
# counting is lost first, so it is replayed most
REPLAY: Final[dict[QuestionKind, int]] = {
    "count": 12,
    "digit": 3,
    "reading": 1,
    "attribute": 2,
    "place": 1,
    "existence": 3,
    "needle": 3,
    "where": 2,
    "relation": 4,
}

# scenes of the other stages are not seen again
_OFFSET: Final = 3 << 32
_WIDE: Final = 48  # tokens a slot: three turns, or four questions
_SMALLEST: Final = 3  # patches a side of a reduced picture


class EpisodeStream(Dataset[PackedBatch]):
    """Batch number -> pictures with packed questions in the layout of the step.

    Args:
        seed: Seed of pictures and questions.
        batch: Pictures a batch, at most; at least one row.
        world: Processes; their batches of one step have one layout.
    """

    def __init__(self, seed: int, batch: int, world: int) -> None:
        self.seed = seed
        self.batch = batch
        self.world = world

    def layout(self, number: int) -> Layout:
        """Name the layout of a batch."""
        return ROUND[number // self.world % len(ROUND)]

    def __getitem__(self, number: int) -> PackedBatch:
        layout = self.layout(number)
        rows = max(1, self.batch // COST[layout])
        # numbers of rows need not be dense, only never the same twice
        indices = range(number * self.batch, number * self.batch + rows)
        if layout in ("single", "talk", "small"):
            return self._single(layout, indices, number)
        if layout == "compare":
            return _several([show_pair(self.seed, "train", i) for i in indices], 4)
        if layout == "in_context":
            return _several([show_examples(self.seed, "train", i) for i in indices], 1)
        return _several([show_video(self.seed, "train", i) for i in indices], 6)

    def _single(self, layout: Layout, indices: range, number: int) -> PackedBatch:
        scenes = [draw_scene(self.seed, "train", _OFFSET + i) for i in indices]
        pixels = torch.from_numpy(np.stack([scene.pixels for scene in scenes]))
        visual = GRID * GRID
        if layout == "small":
            rng = np.random.default_rng((self.seed, 4, number))
            height, width = (int(side) for side in rng.integers(_SMALLEST, GRID, 2))
            pixels, visual = shrink(pixels, height, width), height * width
        rows = []
        talk = layout == "talk"
        for index, scene in zip(indices, scenes, strict=True):
            rng = np.random.default_rng((self.seed, 5, index))
            threads: list[Thread]
            if talk:
                tries = [converse(scene, rng) for _ in range(10)]
                threads = [tuple((q.text, q.answer) for q in turns) for turns in tries if turns]
            else:
                threads = [((q.text, q.answer),) for q in mixture(scene, rng, REPLAY)]
            slots, size = (6, _WIDE) if talk else (7, 32)
            rows.append(pack(threads, slots, prefix=prefix_ids(visual=visual), width=size))
        return stack(pixels, rows, prefix=1 + visual, width=size)


def shrink(pixels: Tensor, height: int, width: int) -> Tensor:
    """Resize pictures to a smaller grid of patches, bicubic with antialiasing.

    Args:
        pixels: uint8, shape (I, 96, 96, 3).
        height: Patches from top to bottom.
        width: Patches from left to right.

    Returns:
        uint8, shape (I, 8 * height, 8 * width, 3).
    """
    size = (PATCH_SIZE * height, PATCH_SIZE * width)
    planes = pixels.permute(0, 3, 1, 2).float()
    small = F.interpolate(planes, size, mode="bicubic", antialias=True, align_corners=False)
    return small.round_().clamp_(0, 255).byte().permute(0, 2, 3, 1).contiguous()


# how often a form counts: those that need the place in the sequence are the hardest
_WEIGHT: Final = {"changed": 3, "last": 2, "color": 2}


def _several(shown: list[Shown], slots: int) -> PackedBatch:
    """Make rows of several pictures each, all with prefixes of one length."""
    rows = []
    for example in shown:
        prefix = prefix_ids(example.prefix)
        # what is asked for only in training comes last, and may find no room
        asked = sorted(example.asked, key=lambda q: q.form == "other")
        threads = [((q.text, q.answer),) for q in asked for _ in range(_WEIGHT.get(q.form, 1))]
        row = pack(threads, slots, prefix=prefix, width=_WIDE)
        # the answers of examples are asked for as well
        for at in range(len(prefix) - 1):
            if prefix[at] == WORD_ID[":"]:
                row[3, at] = prefix[at + 1]
        rows.append(row)
    pixels = torch.from_numpy(np.stack([s.pixels for example in shown for s in example.scenes]))
    return stack(pixels, rows, prefix=len(prefix), width=_WIDE)
