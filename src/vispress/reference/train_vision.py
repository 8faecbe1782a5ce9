"""Stage 1: the vision encoder and the projector learn to see, from dense labels alone."""

from pathlib import Path
from typing import Final

import torch
from torch.utils.data import Dataset
from transformers import LlavaForConditionalGeneration

from vispress.reference.bar import progress_bar
from vispress.reference.dense import DenseBatch, DenseHeads, collate
from vispress.reference.loop import LOG_EVERY, Budget, Means, Run, stream
from vispress.reference.model import encode_image, normalise
from vispress.reference.optim import make_optimizer
from vispress.reference.parallel import is_main, rank_and_world
from vispress.reference.scenes import draw_scene

BATCH: Final = 32
PEAK: Final = 3e-3
FLOOR: Final = 0.1


class VisionStream(Dataset[DenseBatch]):
    """Batch number -> freshly drawn scenes with dense labels.

    Args:
        seed: Seed of the scenes.
        batch: Scenes a batch.
    """

    def __init__(self, seed: int, batch: int) -> None:
        self.seed = seed
        self.batch = batch

    def __getitem__(self, step: int) -> DenseBatch:
        first = step * self.batch
        return collate([draw_scene(self.seed, "train", first + i) for i in range(self.batch)])


def train_vision(
    model: LlavaForConditionalGeneration,
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
        model: The model; its decoder layers are not touched.
        heads: Dense heads, trained along.
        folder: Log and state.
        seed: Seed of the scenes.
        budget: When to end.
        device: Where `model` and `heads` are.
        workers: Processes that draw.
        batch: Images a step, shared evenly by all processes.
    """
    share = batch // rank_and_world()[1]
    words = model.get_input_embeddings()
    modules: dict[str, torch.nn.Module] = {
        "vision": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "words": words,
        "heads": heads,
    }
    optimizer = make_optimizer(modules, lr=PEAK)
    settings = {"stage": "vision", "seed": seed, "batch": batch}
    run = Run(folder, modules, optimizer, budget=budget, peak=PEAK, floor=FLOOR, settings=settings)
    run.resume()
    batches = stream(VisionStream(seed, share), run.at.step, workers=workers)
    means = Means()
    with progress_bar("vision", visible=is_main()) as update:
        while run.progress < 1:
            data: DenseBatch = next(batches).to(device)
            with torch.autocast(device.type, torch.bfloat16):
                seen = encode_image(model, normalise(data.pixels))
                loss, scores = heads(*seen, words.weight, data)
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
