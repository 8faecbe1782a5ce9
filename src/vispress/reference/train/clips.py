"""Stage 3 of the Qwen reference: clips, while single pictures are replayed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vispress.reference.model.architecture import QwenReference
from vispress.reference.model.packing import PackedBatch
from vispress.reference.model.qwen import TOKENS_PER_SECOND
from vispress.reference.train.clip_batches import ROUND, ClipStream
from vispress.reference.train.language import SLOTS
from vispress.reference.train.loop import Budget, Run
from vispress.reference.train.parallel import rank_and_world
from vispress.reference.train.third_stage import BATCH, train_third
from vispress.reference.world.clips import STEPS


def train_clips(
    architecture: QwenReference,
    model: Any,
    folder: Path,
    *,
    seed: int,
    budget: Budget,
    device: torch.device,
    workers: int = 1,
    batch: int = BATCH,
    save_minutes: float = 2.0,
    report: Callable[[Run], None] | None = None,
) -> None:
    """Train in place, continuing from the state in `folder` if there is one.

    Args:
        architecture: What `model` is.
        model: The model after stage 2.
        folder: Log and state.
        seed: Seed of clips, scenes and questions.
        budget: When to end; a step of a clip counts as an image.
        device: Where `model` is.
        workers: Processes that draw.
        batch: Clips a step, shared evenly by all processes.
        save_minutes: Minutes of training between saved states.
        report: Called after each saved state (evaluation, export).
    """
    # a checkpoint that knows no videos has transformers' default
    model.config.vision_config.tokens_per_second = TOKENS_PER_SECOND
    world = rank_and_world()[1]

    def hidden(layout: str, packed: PackedBatch) -> tuple[Tensor, int]:
        if layout == "clip":
            return architecture.hidden_clips(model, packed), STEPS * len(packed.pixels)
        return architecture.hidden(model, packed)[0], len(packed.pixels)

    train_third(
        model,
        folder,
        {**architecture.parts(model), "language": model.model.language_model},
        ClipStream(architecture, seed, batch // world, SLOTS, world),
        hidden,
        settings={
            "stage": "clips",
            "architecture": architecture.name,
            "seed": seed,
            "batch": batch,
        },
        layouts=ROUND,
        budget=budget,
        device=device,
        workers=workers,
        save_minutes=save_minutes,
        report=report,
    )
