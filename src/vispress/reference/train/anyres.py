"""Growing the AnyRes reference: the decoder of a grafted LLaVA learns newlines and crops.

The encoder, the projector and the words stay the parent's: a crop is one more view of 96 x 96
pixels. What is new to the decoder is their order, and twice as many tokens.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import LlavaNextForConditionalGeneration

from vispress.reference.model.architecture import embed_and_run
from vispress.reference.model.attention import FULL, PACKED
from vispress.reference.model.llava_next import see_crops, visual_tokens
from vispress.reference.model.packing import QUOTA, PackedBatch, pack, prefix_ids, stack
from vispress.reference.train.loop import Budget, Run
from vispress.reference.train.third_stage import train_third
from vispress.reference.world.large import Fields, cut, draw_large
from vispress.reference.world.questions import mixture
from vispress.reference.world.scenes import draw_scene
from vispress.reference.world.words import QuestionKind

PEAK: Final = 6e-4
ROUND: Final[tuple[Fields, ...]] = ((1, 1), (2, 2), (1, 2), (2, 1), (2, 2), (1, 1))
"""Layouts in turn; a third are scenes, so that what is known does not fall."""

_ROWS: Final[dict[Fields, int]] = {(1, 1): 10, (2, 2): 4, (1, 2): 7, (2, 1): 7}
_MOST: Final = max(_ROWS.values())
_ASKED: Final[dict[QuestionKind, int]] = {**QUOTA, "reading": 1, "digit": 3, "count": 7}
_SLOTS: Final = 6
_PRINT: Final = 3  # times that the sign of a large picture is asked about
# scenes of the other stages are not seen again
_OFFSET: Final = 5 << 32


class AnyResStream(Dataset[PackedBatch]):
    """Batch number -> pictures with their crops, and packed questions about all of a picture.

    Args:
        seed: Seed of pictures and questions.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def fields(self, number: int) -> Fields:
        """Name the crops of a batch's pictures."""
        return ROUND[number % len(ROUND)]

    def layout(self, number: int) -> str:
        """Name the layout of a batch."""
        return "{}x{}".format(*self.fields(number))

    def __getitem__(self, number: int) -> PackedBatch:
        fields = self.fields(number)
        prefix = prefix_ids(visual=visual_tokens(fields))
        pixels, rows = [], []
        for index in range(number * _MOST, number * _MOST + _ROWS[fields]):
            if fields == (1, 1):
                scene = draw_scene(self.seed, "train", _OFFSET + index)
            else:
                scene = draw_large(self.seed, "train", _OFFSET + index, fields)
            asked = mixture(scene, np.random.default_rng((self.seed, 9, index)), _ASKED)
            if fields != (1, 1):
                asked = [q for q in asked for _ in range(_PRINT if q.kind == "reading" else 1)]
            pixels.append(cut(scene.pixels))
            threads = [((q.text, q.answer),) for q in asked]
            rows.append(pack(threads, _SLOTS, prefix=prefix))
        return stack(torch.from_numpy(np.stack(pixels)), rows, prefix=len(prefix))


class _Newline(nn.Module):
    """What an optimiser and a saved state take by name."""

    def __init__(self, newline: nn.Parameter) -> None:
        super().__init__()
        self.newline = newline


def train_anyres(
    model: LlavaNextForConditionalGeneration,
    folder: Path,
    *,
    seed: int,
    budget: Budget,
    device: torch.device,
    workers: int = 0,
    save_minutes: float = 3.0,
    report: Callable[[Run], None] | None = None,
) -> None:
    """Train the decoder in place, continuing from the state in `folder` if there is one.

    Args:
        model: Of `graft`.
        folder: Log and state.
        seed: Seed of pictures and questions.
        budget: When to end.
        device: Where `model` is.
        workers: Processes that draw.
        save_minutes: Minutes of training between saved states.
        report: Called after each saved state (evaluation, export).
    """
    decoder = model.model.language_model
    model.requires_grad_(False)
    decoder.layers.requires_grad_(True)
    decoder.norm.requires_grad_(True)
    model.model.image_newline.requires_grad_(True)
    model.model.vision_tower.set_attn_implementation(FULL)
    decoder.set_attn_implementation(PACKED)

    def hidden(layout: str, packed: PackedBatch) -> tuple[Tensor, int]:
        rows, columns = (int(side) for side in layout.split("x"))
        features = see_crops(model, packed.pixels, (rows, columns))
        states: Tensor = embed_and_run(model, packed, features).last_hidden_state
        return states, len(packed.pixels)

    train_third(
        model,
        folder,
        {"language": decoder, "newline": _Newline(model.model.image_newline)},
        AnyResStream(seed),
        hidden,
        settings={"stage": "anyres", "seed": seed},
        layouts=sorted({"{}x{}".format(*fields) for fields in ROUND}),
        budget=budget,
        device=device,
        workers=workers,
        save_minutes=save_minutes,
        report=report,
        peak=PEAK,
        early_until=0.0,
        mixed=device.type != "cpu",
    )
    model.set_attn_implementation("sdpa")
    model.eval()
