"""Stage 2: the language model learns to answer, all questions about a scene in one sequence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from vispress.reference.model.architecture import Architecture
from vispress.reference.model.dense import DenseHeads
from vispress.reference.model.packing import LanguageStream, PackedBatch
from vispress.reference.train.bar import progress_bar
from vispress.reference.train.loop import LOG_EVERY, Budget, Means, Run, Saves, stream
from vispress.reference.train.optim import make_optimizer
from vispress.reference.train.parallel import is_main, rank_and_world

BATCH: Final = 16
SLOTS: Final = 7
PEAK: Final = 3e-3
FLOOR: Final = 0.03
EASY: Final = 4_000

# the vision side is nearly done: it moves slowly and keeps what it knows
SCALES: Final = {"vision": 0.2, "projector": 0.3, "heads": 0.3}
EARLY_UNTIL: Final = 0.8


def answer_loss(
    model: Any, hidden: Tensor, batch: PackedBatch, *, early: bool
) -> tuple[Tensor, Tensor]:
    """Compute cross entropy of answer words and end, and accuracy of the first answer word.

    Args:
        model: Its output embedding reads `hidden`.
        hidden: Shape (B, L, D).
        batch: The labels.
        early: Whether to ask for the first word before the question has ended, too.
    """
    labels = batch.labels.flatten()
    # the first answer word is asked for at the colon, which follows the early labels
    first = (batch.early.roll(1, dims=1) >= 0) & (batch.early < 0)
    at = labels >= 0
    logits = model.lm_head(hidden.flatten(0, 1)[at]).float()
    loss = F.cross_entropy(logits, labels[at])
    hits = (logits.argmax(-1) == labels[at])[first.flatten()[at]].float().mean()
    if early:
        sooner = batch.early.flatten()
        at = sooner >= 0
        logits = model.lm_head(hidden.flatten(0, 1)[at]).float()
        loss = loss + F.cross_entropy(logits, sooner[at])
    return loss, hits.detach()


def train_language(
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
    easy: int = EASY,
    save_minutes: float = 5.0,
    report: Callable[[Run], None] | None = None,
) -> None:
    """Train in place, continuing from the state in `folder` if there is one.

    Args:
        architecture: What `model` is.
        model: The model after stage 1.
        heads: Dense heads after stage 1; their loss stays on with a small weight.
        folder: Log and state.
        seed: Seed of scenes and questions.
        budget: When to end.
        device: Where `model` and `heads` are.
        workers: Processes that draw.
        batch: Images a step, shared evenly by all processes.
        easy: The first so many images show fewer objects.
        save_minutes: Minutes of training between saved states.
        report: Called after each saved state (evaluation, export).
    """
    world = rank_and_world()[1]
    share = batch // world
    words = model.get_input_embeddings()
    language = model.model.language_model
    modules = {**architecture.parts(model), "language": language, "heads": heads}
    optimizer = make_optimizer(modules, lr=PEAK, scales=SCALES)
    settings = {
        "stage": "language",
        "architecture": architecture.name,
        "seed": seed,
        "batch": batch,
        "easy": easy,
    }
    run = Run(folder, modules, optimizer, budget=budget, peak=PEAK, floor=FLOOR, settings=settings)
    run.resume()
    data = LanguageStream(architecture, seed, share, SLOTS, easy, world)
    batches = stream(data, run.at.step, workers=workers)
    means = Means()
    saves = Saves(run, save_minutes, report)
    with progress_bar("language", visible=is_main()) as update:
        while run.progress < 1:
            packed: PackedBatch = next(batches).to(device)
            with torch.autocast(device.type, torch.bfloat16):
                hidden, seen = architecture.hidden(model, packed)
                early = run.progress < EARLY_UNTIL
                loss, hits = answer_loss(model, hidden, packed, early=early)
                assert packed.dense is not None
                dense, scores = heads(seen, words.weight, packed.dense)
            run.advance(loss + 0.1 * dense, share)
            means.add({"loss": loss.detach(), "first": hits, **scores})
            if means.count == LOG_EVERY:
                shown = means.take()
                run.log(shown)
                update(run.progress, shown)
            saves.when_due()
            update(run.progress, {})
    if means.count:
        run.log(means.take())
    saves.now()
