"""Train a method by the loss of answers, through soft plans; the model itself stays frozen."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from vispress.bench.model.loaded_model import LoadedModel
from vispress.bench.tasks.task import Prompt
from vispress.distillation.distil import HELD_OUT, Curve, rate
from vispress.distillation.lessons import Lesson, Pupil
from vispress.distillation.own_answers import with_answers
from vispress.errors import ConfigError
from vispress.training import compression_loss, set_progress


@contextmanager
def frozen(model: nn.Module, module: nn.Module) -> Iterator[None]:
    """Inside, a model trains nothing but the parameters of one part."""
    own = {id(parameter) for parameter in module.parameters()}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def teach(pupil: Pupil) -> Curve:
    """Move a method's parameters down the loss of answers, and what the method adds to it.

    AdamW on them alone; the rate warms up over 20 steps and falls along a cosine, and schedules of
    the method (`Compressor.at`) follow. What is held out is measured as in use: tokens dropped.

    Raises:
        ConfigError: There are too few prompts, one has no answer, or there is nothing to learn.
    """
    prompts, model, size = list(pupil.prompts), pupil.loaded.model, pupil.batch_size
    if len(prompts) < 2 * HELD_OUT:
        raise ConfigError(f"training needs at least {2 * HELD_OUT} prompts, got {len(prompts)}")
    test = prompts[::HELD_OUT]
    kept = [prompt for number, prompt in enumerate(prompts) if number % HELD_OUT]
    module, moved = pupil.compress(), pupil.begin("training", pupil.steps)
    optimizer = torch.optim.AdamW(module.parameters(), lr=pupil.lr, weight_decay=0.01)
    curve, drawn = Curve(), _drawn(kept, size, pupil.seed)
    if not (done := pupil.unfinished.restore(module, optimizer, curve)):
        curve.held_out.append(answer_loss(pupil.loaded, test, size))
    with frozen(model, module):
        model.train()
        try:
            for step, batch in enumerate(islice(drawn, done, pupil.steps), done):
                set_progress(model, step / pupil.steps)
                for group in optimizer.param_groups:
                    group["lr"] = pupil.lr * rate(step, pupil.steps)
                loss = _loss(pupil.loaded, batch)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                if not curve.loss and any(prompt.visuals for prompt in batch):
                    _check_gradients(pupil.method.name, module)
                nn.utils.clip_grad_norm_(module.parameters(), 1.0)
                optimizer.step()
                curve.loss.append(float(loss.detach()))
                pupil.unfinished.note(module, optimizer, curve)
                moved(1)
        finally:
            model.eval()
            set_progress(model, 0.0)
    curve.held_out.append(answer_loss(pupil.loaded, test, size))
    return curve


@torch.no_grad()
def answer_loss(loaded: LoadedModel, prompts: Sequence[Prompt], size: int) -> float:
    """Average the loss of a model's answers, in nats a token, batch by batch."""
    total = 0.0
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        inputs = with_answers(loaded, part)
        total += float(loaded.model(**inputs, use_cache=False).loss) * len(part)
    return total / len(prompts)


def _loss(loaded: LoadedModel, batch: Sequence[Prompt]) -> Tensor:
    with compression_loss(loaded.model) as extra:
        loss: Tensor = loaded.model(**with_answers(loaded, batch), use_cache=False).loss
        return loss + extra().to(loss)


def _check_gradients(name: str, module: nn.Module) -> None:
    if not any(one.grad is not None and bool(one.grad.any()) for one in module.parameters()):
        raise ConfigError(
            f"no gradient reaches the parameters of {name}, as where every token stays; give a "
            "keep_ratio below 1"
        )


def _drawn(prompts: Sequence[Prompt], size: int, seed: int) -> Iterator[list[Prompt]]:
    """Batches without end; a new round begins when all were drawn."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(prompts), generator=generator).tolist()
        for start in range(0, max(1, len(order) - size + 1), size):
            yield [prompts[place] for place in order[start : start + size]]


_SIZES: dict[str, Any] = {"samples": 1600, "steps": 100, "lr": 5e-4, "order": 1}
LESSONS = tuple(
    Lesson(method, "answers", teach, "loss of answers, tokens dropped", **_SIZES)
    for method in ("covipal", "hicom", "pvc", "vision_selector")
)
