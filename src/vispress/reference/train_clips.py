"""Stage 3 of the Qwen reference: clips, while single pictures are replayed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch.utils.data import Dataset

from vispress.reference.architecture import QwenReference
from vispress.reference.bar import progress_bar
from vispress.reference.clip_batches import ROUND, ClipStream
from vispress.reference.clips import STEPS
from vispress.reference.loop import LOG_EVERY, Budget, Means, Run, stream
from vispress.reference.optim import make_optimizer
from vispress.reference.packing import PackedBatch
from vispress.reference.parallel import is_main, rank_and_world
from vispress.reference.qwen import TOKENS_PER_SECOND
from vispress.reference.train_language import SLOTS, answer_loss

BATCH: Final = 24
PEAK: Final = 1e-3
FLOOR: Final = 0.03
EARLY_UNTIL: Final = 0.7

# the vision side is done; it moves a little, as frames are not quite pictures
SCALES: Final = {"vision": 0.1, "projector": 0.2}


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
    world = rank_and_world()[1]
    # a checkpoint that knows no videos has transformers' default
    model.config.vision_config.tokens_per_second = TOKENS_PER_SECOND
    modules = {**architecture.parts(model), "language": model.model.language_model}
    optimizer = make_optimizer(modules, lr=PEAK, scales=SCALES)
    settings = {"stage": "clips", "architecture": architecture.name, "seed": seed, "batch": batch}
    run = Run(folder, modules, optimizer, budget=budget, peak=PEAK, floor=FLOOR, settings=settings)
    run.resume()
    data = ClipStream(architecture, seed, batch // world, SLOTS, world)
    drawn: Dataset[PackedBatch] = data
    batches = stream(drawn, run.at.step, workers=workers)
    means = {layout: Means() for layout in ROUND}
    due = run.at.seconds + 60 * save_minutes
    with progress_bar("clips", visible=is_main()) as update:
        while run.progress < 1:
            layout = data.layout(run.at.step * world)
            packed: PackedBatch = next(batches).to(device)
            with torch.autocast(device.type, torch.bfloat16):
                if layout == "clip":
                    hidden = architecture.hidden_clips(model, packed)
                else:
                    hidden, _ = architecture.hidden(model, packed)
                loss, hits = answer_loss(model, hidden, packed, early=run.progress < EARLY_UNTIL)
            run.advance(loss, len(packed.pixels) * (STEPS if layout == "clip" else 1))
            means[layout].add({f"{layout}_loss": loss.detach(), layout: hits})
            if run.at.step % LOG_EVERY == 0 or run.progress >= 1:
                shown = {k: v for m in means.values() if m.count for k, v in m.take().items()}
                run.log(shown)
                update(run.progress, {k: v for k, v in shown.items() if not k.endswith("loss")})
            if run.at.seconds >= due:
                due = run.at.seconds + 60 * save_minutes
                run.save()
                if report is not None and is_main():
                    report(run)
            update(run.progress, {})
    run.save()
    if report is not None and is_main():
        report(run)
