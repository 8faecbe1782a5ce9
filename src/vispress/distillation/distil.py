"""Teach a network from examples: the loop, and the loss against what a model attends to."""

import math
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from vispress.distillation.curve import Curve as Curve
from vispress.distillation.lessons import Pupil
from vispress.distillation.targets import Heard
from vispress.distillation.unfinished import Unfinished
from vispress.errors import ConfigError

HELD_OUT = 10
"""One example in so many is never learned from."""
WARM_UP = 20
FINAL = 0.03
"""Share of the learning rate that is left at the end."""


class Example(Protocol):
    """What a network learns from; those of one size come in one batch."""

    @property
    def target(self) -> Tensor:
        """`[N]`, what is wanted of each token."""


E = TypeVar("E", bound=Example)


def distil(
    module: nn.Module,
    heard: Sequence[E],
    *,
    loss: Callable[[nn.Module, Sequence[E]], Tensor],
    steps: int = 300,
    batch: int = 64,
    lr: float = 2e-3,
    seed: int = 0,
    advance: Callable[[float], None] | None = None,
    unfinished: Unfinished | None = None,
) -> Curve:
    """Move a module's parameters down a loss on examples, by AdamW.

    The rate warms up over 20 steps and falls along a cosine. A batch has images of one size.

    Args:
        module: Changed in place, on its device.
        heard: Examples; one in ten is held out.
        loss: Of a module and a batch of examples of one size, a mean over them.
        steps: At least 1.
        batch: Images a step, at most.
        lr: Highest learning rate.
        seed: Of the order; equal ones give equal parameters on the same machine.
        advance: Told the loss of each step.
        unfinished: Where a stopped training goes on from.

    Raises:
        ConfigError: There are too few examples, or a parameter is frozen.
    """
    if len(heard) < 2 * HELD_OUT:
        raise ConfigError(
            f"training needs at least {2 * HELD_OUT} images with a question behind them, got "
            f"{len(heard)}"
        )
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    if frozen:
        raise ConfigError(f"{frozen[0]} is frozen (requires_grad=False), and so cannot be trained")
    kept = [one for number, one in enumerate(heard) if number % HELD_OUT]
    test = heard[::HELD_OUT]
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.01)
    curve, drawn, unfinished = Curve(), _Batches(kept, batch, seed), unfinished or Unfinished()
    if not (done := unfinished.restore(module, optimizer, curve)):
        curve.held_out.append(_mean(module, test, batch, loss))
    for _ in range(done):
        drawn.next()
    module.train()
    for step in range(done, steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * rate(step, steps)
        found = loss(module, drawn.next())
        optimizer.zero_grad()
        found.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        curve.loss.append(float(found.detach()))
        unfinished.note(module, optimizer, curve)
        if advance is not None:
            advance(curve.loss[-1])
    module.eval()
    curve.held_out.append(_mean(module, test, batch, loss))
    return curve


def learn(
    pupil: Pupil, heard: Sequence[E], loss: Callable[[nn.Module, Sequence[E]], Tensor]
) -> Curve:
    """Compress a pupil's model, and move the method's parameters down a loss on what was heard."""
    module, moved = pupil.compress(), pupil.begin("training", pupil.steps)
    return distil(
        module,
        heard,
        loss=loss,
        steps=pupil.steps,
        lr=pupil.lr,
        seed=pupil.seed,
        advance=lambda _: moved(1),
        unfinished=pupil.unfinished,
    )


def divergence(module: nn.Module, batch: Sequence[Heard]) -> Tensor:
    """Average the Kullback-Leibler divergence of targets and scores, in nats.

    Args:
        module: Called with features `[B, N, D]`, text `[B, T, D]` and `valid [B, T]`, gives
            `[B, N]`.
        batch: Images of one size.
    """
    device = next(module.parameters()).device
    text, valid = padded([one.text for one in batch], device)
    features = torch.stack([one.features for one in batch]).to(device)
    target = torch.stack([one.target for one in batch]).to(device)
    score = module(features, text, valid).log_softmax(dim=-1)
    return nn.functional.kl_div(score, target.to(score), reduction="batchmean")


def padded(texts: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Put texts `[T, D]` into one `[B, T, D]`, and say where they are, `[B, T]` bool."""
    longest = max(map(len, texts))
    whole = texts[0].new_zeros(len(texts), longest, texts[0].shape[1])
    for row, text in enumerate(texts):
        whole[row, : len(text)] = text
    valid = torch.arange(longest) < torch.tensor([[len(text)] for text in texts])
    return whole.to(device), valid.to(device)


class _Batches(Generic[E]):
    """Batches of images of one size, each size as often as it has images.

    Args:
        heard: Examples.
        batch: Images a batch, at most.
        seed: Of the order.
    """

    def __init__(self, heard: Sequence[E], batch: int, seed: int) -> None:
        self.heard, self.batch = heard, batch
        self.generator = torch.Generator().manual_seed(seed)
        self.left: list[list[int]] = []

    def next(self) -> list[E]:
        """Draw the next one; a new round begins when all were drawn."""
        if not self.left:
            order = torch.randperm(len(self.heard), generator=self.generator).tolist()
            by_size: dict[int, list[int]] = {}
            for place in order:
                by_size.setdefault(len(self.heard[place].target), []).append(place)
            cut = [
                places[start : start + self.batch]
                for places in by_size.values()
                for start in range(0, len(places), self.batch)
            ]
            turns = torch.randperm(len(cut), generator=self.generator).tolist()
            self.left = [cut[turn] for turn in turns]
        return [self.heard[place] for place in self.left.pop()]


@torch.no_grad()
def _mean(
    module: nn.Module,
    heard: Sequence[E],
    batch: int,
    loss: Callable[[nn.Module, Sequence[E]], Tensor],
) -> float:
    module.eval()
    by_size: dict[int, list[E]] = {}
    for one in heard:
        by_size.setdefault(len(one.target), []).append(one)
    total = 0.0
    for same in by_size.values():
        for start in range(0, len(same), batch):
            part = same[start : start + batch]
            total += float(loss(module, part)) * len(part)
    return total / len(heard)


def rate(step: int, steps: int) -> float:
    """Share of the highest learning rate: a rise of 20 steps, then a cosine."""
    falling = (1 + math.cos(math.pi * step / steps)) / 2
    return min(1.0, (step + 1) / WARM_UP) * (FINAL + (1 - FINAL) * falling)
