"""Stage 3: several pictures, examples in the prompt, conversations, frames and smaller pictures."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from vispress.reference.model.architecture import embed_and_run
from vispress.reference.model.llava import normalise
from vispress.reference.model.packing import PackedBatch
from vispress.reference.train.batches import EpisodeStream
from vispress.reference.train.loop import Budget, Run
from vispress.reference.train.parallel import rank_and_world
from vispress.reference.train.third_stage import BATCH, train_third
from vispress.reference.world.words import VOCABULARY

ALONE: Final = ("single", "talk", "small")
"""Layouts of one picture, from which the vision encoder learns."""


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
    """Compute projected features (I, N, D) of pictures (I, height, width, 3) of any one size.

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

    def hidden(layout: str, packed: PackedBatch) -> tuple[Tensor, int]:
        features = see(model, packed.pixels, train=layout in ALONE)
        states: Tensor = embed_and_run(model, packed, features).last_hidden_state
        return states, len(packed.pixels)

    train_third(
        model,
        folder,
        {
            "vision": model.model.vision_tower,
            "projector": model.model.multi_modal_projector,
            "language": model.model.language_model,
        },
        EpisodeStream(seed, batch // world, world),
        hidden,
        settings={"stage": "episodes", "seed": seed, "batch": batch},
        layouts=(*ALONE, "compare", "in_context", "video"),
        budget=budget,
        device=device,
        workers=workers,
        save_minutes=save_minutes,
        report=report,
    )
