"""A stage's loop: budgets, the learning-rate curve, logs and resumable state."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vispress.errors import ConfigError
from vispress.reference.train.optim import MuonAdamW
from vispress.reference.train.parallel import average_gradients, is_main, rank_and_world

_WARM_UP: Final = 0.02
_CLIP: Final = 1.0

LOG_EVERY: Final = 50  # steps


@dataclass(frozen=True, slots=True)
class Budget:
    """Length of a stage; the learning rate follows whichever limit is nearer.

    Args:
        minutes: Wall-clock minutes spent training, pauses between resumed runs not counted.
        images: Images drawn. Runs limited by images alone are reproducible.

    Raises:
        ConfigError: Neither is given, or one is not positive.
    """

    minutes: float | None = None
    images: int | None = None

    def __post_init__(self) -> None:
        limits = [v for v in (self.minutes, self.images) if v is not None]
        if not limits or min(limits) <= 0:
            raise ConfigError(f"a budget needs positive minutes or images, got {self}")

    def progress(self, seconds: float, images: int) -> float:
        """Compute the share that is spent, `>= 0`; the stage ends at 1."""
        shares = [0.0]
        if self.minutes is not None:
            shares.append(seconds / 60 / self.minutes)
        if self.images is not None:
            shares.append(images / self.images)
        return max(shares)


def learning_rate(progress: float, *, peak: float, floor: float) -> float:
    """Compute the learning rate: warm-up over 2 %, then a cosine from `peak` to `floor * peak`."""
    if progress < _WARM_UP:
        return peak * max(progress / _WARM_UP, 0.02)
    t = min(1.0, (progress - _WARM_UP) / (1 - _WARM_UP))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * t)))


@dataclass(slots=True)
class Progress:
    """Counters of a stage that survive a resume."""

    step: int = 0
    images: int = 0
    seconds: float = 0.0


class Means:
    """Running means of scalars, kept on the device until they are read."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Add one scalar for each name."""
        self.count += 1
        for key, value in values.items():
            self._sums[key] = self._sums[key] + value if key in self._sums else value

    def take(self) -> dict[str, float]:
        """Take the means since the last call."""
        means = {key: float(value) / self.count for key, value in self._sums.items()}
        self.count, self._sums = 0, {}
        return means


class Run:
    """One stage in one folder: counters, log, and atomic, resumable state.

    Args:
        folder: Where `log.jsonl` and `state.safetensors` go; created.
        modules: What is trained, by name.
        optimizer: Its optimiser.
        budget: When to end.
        peak: Highest learning rate.
        floor: Final learning rate as a share of `peak`.
        settings: Must be equal for a resume to be accepted.
    """

    def __init__(
        self,
        folder: Path,
        modules: dict[str, nn.Module],
        optimizer: MuonAdamW,
        *,
        budget: Budget,
        peak: float,
        floor: float,
        settings: dict[str, Any],
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.modules = modules
        self.optimizer = optimizer
        self.budget = budget
        self.peak = peak
        self.floor = floor
        self.settings = json.loads(json.dumps(settings))
        self.at = Progress()
        self._tick = time.perf_counter()

    @property
    def progress(self) -> float:
        """Share of the budget that is spent."""
        return self.budget.progress(self.at.seconds, self.at.images)

    def advance(self, loss: Tensor, images: int) -> None:
        """Back-propagate, clip, update and count one batch."""
        loss.backward()  # type: ignore[no-untyped-call]
        rate = learning_rate(self.progress, peak=self.peak, floor=self.floor)
        params = []
        for group in self.optimizer.param_groups:
            group["lr"] = rate
            params += group["params"]
        now = time.perf_counter()
        self.at.seconds = average_gradients(params, self.at.seconds + now - self._tick)
        self._tick = now
        torch.nn.utils.clip_grad_norm_(params, _CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.at.step += 1
        self.at.images += images * rank_and_world()[1]

    def skip_time(self) -> None:
        """Do not count what happened since the last `advance` (evaluation, say)."""
        self._tick = time.perf_counter()

    def log(self, values: dict[str, Any]) -> None:
        """Append a line to `log.jsonl`, with the counters (main process only)."""
        if not is_main():
            return
        line = {
            "step": self.at.step,
            "images": self.at.images,
            "minutes": round(self.at.seconds / 60, 2),
            **{k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()},
        }
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _trim_log(self) -> None:
        """Drop lines about steps that were lost when the run stopped."""
        path = self.folder / "log.jsonl"
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if json.loads(line)["step"] <= self.at.step]
            path.write_text("".join(kept))

    def save(self) -> None:
        """Write everything a resume needs in one file, atomically (main process only)."""
        if not is_main():
            return
        tensors = {
            f"{name}.{key}": value.detach().clone().contiguous()
            for name, module in self.modules.items()
            for key, value in module.state_dict().items()
        }
        for index, entry in self.optimizer.state_dict()["state"].items():
            for key, value in entry.items():
                tensors[f"optimizer.{index}.{key}"] = value.contiguous()
        at = {"step": self.at.step, "images": self.at.images, "seconds": self.at.seconds}
        metadata = {"progress": json.dumps(at), "settings": json.dumps(self.settings)}
        path = self.folder / "state.safetensors"
        temporary = path.with_suffix(".tmp")
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)  # noqa: PTH105 - atomic on every platform

    def resume(self) -> bool:
        """Continue from `state.safetensors` if there is one.

        Returns:
            Whether there was one.

        Raises:
            CheckpointError: The file is damaged.
            ConfigError: It was written with other settings.
        """
        path = self.folder / "state.safetensors"
        if not path.exists():
            return False
        tensors, metadata = read_state(path)
        if (trained := json.loads(metadata["settings"])) != self.settings:
            raise ConfigError(f"{path} was trained with {trained}, not with {self.settings}")
        for name, module in self.modules.items():
            prefix = f"{name}."
            weights = {
                k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)
            }
            module.load_state_dict(weights)
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, field = key.split(".")
                state.setdefault(int(index), {})[field] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.at = Progress(**json.loads(metadata["progress"]))
        if is_main():
            self._trim_log()
        self._tick = time.perf_counter()
        return True


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata of a safetensors file.

    Raises:
        CheckpointError: The file is missing, truncated or not safetensors.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), metadata
    except (SafetensorError, OSError, ValueError) as error:
        from vispress.errors import CheckpointError

        raise CheckpointError(
            f"cannot read {path}: {error}. Delete it and train again, or reinstall the package "
            "if it is the shipped checkpoint"
        ) from error


def _same(batch: Any) -> Any:
    return batch


class Saves:
    """States that are saved while a stage trains, each followed by a report of the main process.

    Args:
        run: The stage.
        minutes: Of training between them.
        report: What follows (evaluation, export), or None.
    """

    def __init__(self, run: Run, minutes: float, report: Callable[[Run], None] | None) -> None:
        self.run, self.report, self.seconds = run, report, 60 * minutes
        self.due = run.at.seconds + self.seconds

    def when_due(self) -> None:
        """Save if it is time to."""
        if self.run.at.seconds >= self.due:
            self.due = self.run.at.seconds + self.seconds
            self.now()

    def now(self) -> None:
        """Save."""
        self.run.save()
        if self.report is not None and is_main():
            self.report(self.run)


def stream(data: Dataset[Any], start: int, *, workers: int) -> Iterator[Any]:
    """Yield this process's share of `data[start * world], data[start * world + 1], ...` forever."""
    rank, world = rank_and_world()
    loader: DataLoader[Any] = DataLoader(
        data,
        batch_size=None,
        sampler=range(start * world + rank, 1 << 40, world),
        num_workers=workers,
        collate_fn=_same,
        prefetch_factor=6 if workers else None,
    )
    return iter(loader)
