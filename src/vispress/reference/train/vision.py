"""Stage 1: the vision encoder and the projector learn to see, from dense labels alone."""

from pathlib import Path
from typing import Any, Final

import torch
from torch.utils.data import Dataset

from vispress.reference.model.architecture import Architecture
from vispress.reference.model.dense import DenseBatch, DenseHeads
from vispress.reference.train.bar import progress_bar
from vispress.reference.train.loop import LOG_EVERY, Budget, Means, Run, stream
from vispress.reference.train.optim import make_optimizer
from vispress.reference.train.parallel import is_main, rank_and_world
from vispress.reference.world.scenes import draw_scene

BATCH: Final = 32
PEAK: Final = 3e-3
FLOOR: Final = 0.1


class VisionStream(Dataset[DenseBatch]):
    """Batch number -> freshly drawn scenes with dense labels.

    Args:
        architecture: Decides the form of a batch.
        seed: Seed of the scenes.
        batch: Scenes a batch.
        together: Consecutive batches that make one training step.
    """

    def __init__(self, architecture: Architecture, seed: int, batch: int, together: int) -> None:
        self.architecture = architecture
        self.seed = seed
        self.batch = batch
        self.together = together

    def __getitem__(self, number: int) -> DenseBatch:
        first = number * self.batch
        scenes = [draw_scene(self.seed, "train", first + i) for i in range(self.batch)]
        return self.architecture.collate(scenes, self.seed, number // self.together)


def train_vision(
    architecture: Architecture,
    model: Any,
    heads: DenseHeads,
    folder: Path,
    *,
    seed: int,
    budget: Budget,
    device: torch.device,
    workers: int = 1,
    batch: int = BATCH,
) -> None:
    """Train in place, continuing from the state in `folder` if there is one.

    Args:
        architecture: What `model` is.
        model: The model; its decoder layers are not touched.
        heads: Dense heads, trained along.
        folder: Log and state.
        seed: Seed of the scenes.
        budget: When to end.
        device: Where `model` and `heads` are.
        workers: Processes that draw.
        batch: Images a step, shared evenly by all processes.
    """
    world = rank_and_world()[1]
    share = batch // world
    words = model.get_input_embeddings()
    modules = {**architecture.parts(model), "words": words, "heads": heads}
    optimizer = make_optimizer(modules, lr=PEAK)
    settings = {
        "stage": "vision",
        "architecture": architecture.name,
        "seed": seed,
        "batch": batch,
    }
    run = Run(folder, modules, optimizer, budget=budget, peak=PEAK, floor=FLOOR, settings=settings)
    run.resume()
    source = VisionStream(architecture, seed, share, world)
    batches = stream(source, run.at.step, workers=workers)
    means = Means()
    with progress_bar("vision", visible=is_main()) as update:
        while run.progress < 1:
            data: DenseBatch = next(batches).to(device)
            with torch.autocast(device.type, torch.bfloat16):
                seen = architecture.look(model, data.pixels)
                loss, scores = heads(seen, words.weight, data)
            run.advance(loss, share)
            means.add({"loss": loss.detach(), **scores})
            if means.count == LOG_EVERY:
                shown = means.take()
                run.log(shown)
                update(run.progress, shown)
            if run.at.step % 500 == 0:
                run.save()
            update(run.progress, {})
    if means.count:
        run.log(means.take())
    run.save()
