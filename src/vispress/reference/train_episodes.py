"""Stage 3: several pictures, examples in the prompt, conversations, frames and smaller pictures."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlavaForConditionalGeneration

from vispress.reference.architecture import embed_and_run
from vispress.reference.bar import progress_bar
from vispress.reference.batches import EpisodeStream
from vispress.reference.loop import LOG_EVERY, Budget, Means, Run, stream
from vispress.reference.model import normalise
from vispress.reference.optim import make_optimizer
from vispress.reference.packing import PackedBatch
from vispress.reference.parallel import is_main, rank_and_world
from vispress.reference.train_language import answer_loss
from vispress.reference.words import VOCABULARY

BATCH: Final = 24
PEAK: Final = 1e-3
FLOOR: Final = 0.03
EARLY_UNTIL: Final = 0.7

# the vision side is done; it moves a little, so that smaller pictures can be read
SCALES: Final = {"vision": 0.1, "projector": 0.2}


def extend_vocabulary(model: LlavaForConditionalGeneration) -> int:
    """Give words that a checkpoint does not know yet their embeddings.

    New rows lie near the mean of the old ones, so that new words are neither likely nor distant.

    Args:
        model: The model, changed in place.

    Returns:
        How many words are new.
    """
    old = model.get_input_embeddings().weight.detach().clone()
    new = len(VOCABULARY) - len(old)
    if new > 0:
        model.resize_token_embeddings(len(VOCABULARY), mean_resizing=False)
        noise = torch.randn(new, old.shape[1], generator=torch.Generator().manual_seed(0))
        rows = old.mean(0) + 0.5 * old.std(0) * noise.to(old.device)
        with torch.no_grad():
            model.get_input_embeddings().weight[-new:] = rows.to(old.dtype)
    return new


def see(model: LlavaForConditionalGeneration, pixels: Tensor, *, train: bool) -> Tensor:
    """Projected features (I, N, D) of pictures (I, height, width, 3) of any one size.

    Args:
        model: The model.
        pixels: uint8.
        train: Whether gradients reach the vision encoder.
    """
    tower = model.model.vision_tower
    with torch.set_grad_enabled(train and torch.is_grad_enabled()):
        full = pixels.shape[1:3] == (tower.config.image_size,) * 2
        hidden = tower.embeddings(normalise(pixels), interpolate_pos_encoding=not full)
        hidden = tower.pre_layrnorm(hidden)
        for layer in tower.encoder.layers[:-1]:
            hidden = layer(hidden, None)
    features: Tensor = model.model.multi_modal_projector(hidden[:, 1:])
    return features


def train_episodes(
    model: LlavaForConditionalGeneration,
    folder: Path,
    *,
    seed: int,
    budget: Budget,
    device: torch.device,
    workers: int = 1,
    batch: int = BATCH,
    save_minutes: float = 10.0,
    report: Callable[[Run], None] | None = None,
) -> None:
    """Train in place, continuing from the state in `folder` if there is one.

    The vision encoder learns from single pictures only; features of several are taken as they are.

    Args:
        model: The model after stage 2, with all words.
        folder: Log and state.
        seed: Seed of pictures and questions.
        budget: When to end.
        device: Where `model` is.
        workers: Processes that draw.
        batch: Pictures a step, shared evenly by all processes.
        save_minutes: Minutes of training between saved states.
        report: Called after each saved state (evaluation, export).
    """
    world = rank_and_world()[1]
    share = batch // world
    modules: dict[str, torch.nn.Module] = {
        "vision": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "language": model.model.language_model,
    }
    optimizer = make_optimizer(modules, lr=PEAK, scales=SCALES)
    settings = {"stage": "episodes", "seed": seed, "batch": batch}
    run = Run(folder, modules, optimizer, budget=budget, peak=PEAK, floor=FLOOR, settings=settings)
    run.resume()
    data = EpisodeStream(seed, share, world)
    drawn: Dataset[PackedBatch] = data
    batches = stream(drawn, run.at.step, workers=workers)
    means = {layout: Means() for layout in ("single", "talk", "small")}
    means |= {layout: Means() for layout in ("compare", "in_context", "video")}
    due = run.at.seconds + 60 * save_minutes
    with progress_bar("episodes", visible=is_main()) as update:
        while run.progress < 1:
            layout = data.layout(run.at.step * world)
            packed: PackedBatch = next(batches).to(device)
            with torch.autocast(device.type, torch.bfloat16):
                alone = layout in ("single", "talk", "small")
                features = see(model, packed.pixels, train=alone)
                hidden = embed_and_run(model, packed, features).last_hidden_state
                loss, hits = answer_loss(model, hidden, packed, early=run.progress < EARLY_UNTIL)
            run.advance(loss, len(packed.pixels))
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
