"""Stage 3 of the references: batches of several layouts, of which each step takes one."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from vispress.reference.model.packing import PackedBatch
from vispress.reference.train.bar import progress_bar
from vispress.reference.train.language import answer_loss
from vispress.reference.train.loop import LOG_EVERY, Budget, Means, Run, Saves, stream
from vispress.reference.train.optim import make_optimizer
from vispress.reference.train.parallel import is_main, rank_and_world

BATCH: Final = 24
PEAK: Final = 1e-3
FLOOR: Final = 0.03
EARLY_UNTIL: Final = 0.7

# the vision side is done; it moves a little, as smaller pictures and frames are not quite pictures
SCALES: Final = {"vision": 0.1, "projector": 0.2}


class Layouts(Protocol):
    """Numbered batches of packed sequences that know what each of them shows."""

    def layout(self, number: int) -> str:
        """Name the layout of a batch."""
        ...

    def __getitem__(self, number: int) -> PackedBatch: ...


def train_third(
    model: Any,
    folder: Path,
    modules: Mapping[str, nn.Module],
    data: Layouts,
    hidden: Callable[[str, PackedBatch], tuple[Tensor, int]],
    *,
    settings: Mapping[str, Any],
    layouts: Sequence[str],
    budget: Budget,
    device: torch.device,
    workers: int,
    save_minutes: float,
    report: Callable[[Run], None] | None,
    peak: float = PEAK,
    early_until: float = EARLY_UNTIL,
    mixed: bool = True,
) -> None:
    """Train in place, continuing from the state in `folder` if there is one.

    Args:
        model: Its output embedding reads the hidden states.
        folder: Log and state.
        modules: What is trained, by name.
        data: What this process draws.
        hidden: Hidden states (B, L, D) of a batch of a layout, and how many images it counts.
        settings: Must be equal for a resume; with the `stage`.
        layouts: All there are.
        budget: When to end.
        device: Where `model` is.
        workers: Processes that draw.
        save_minutes: Minutes of training between saved states.
        report: Called after each saved state (evaluation, export).
        peak: Highest learning rate.
        early_until: For this share of the stage the first answer word is asked for early, too.
        mixed: Whether products are in bf16, which CPUs without bf16 units are slower in.
    """
    world, named = rank_and_world()[1], dict(modules)
    optimizer = make_optimizer(named, lr=peak, scales=SCALES)
    run = Run(
        folder, named, optimizer, budget=budget, peak=peak, floor=FLOOR, settings=dict(settings)
    )
    run.resume()
    assert isinstance(data, Dataset)
    batches = stream(data, run.at.step, workers=workers)
    means = {layout: Means() for layout in layouts}
    saves = Saves(run, save_minutes, report)
    with progress_bar(settings["stage"], visible=is_main()) as update:
        while run.progress < 1:
            layout = data.layout(run.at.step * world)
            packed: PackedBatch = next(batches).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
                states, images = hidden(layout, packed)
                loss, hits = answer_loss(model, states, packed, early=run.progress < early_until)
            run.advance(loss, images)
            means[layout].add({f"{layout}_loss": loss.detach(), layout: hits})
            if run.at.step % LOG_EVERY == 0 or run.progress >= 1:
                shown = {k: v for m in means.values() if m.count for k, v in m.take().items()}
                run.log(shown)
                update(run.progress, {k: v for k, v in shown.items() if not k.endswith("loss")})
            saves.when_due()
            update(run.progress, {})
    saves.now()
