"""State of a training that may be stopped, in one file: the same command goes on from it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from vispress.distillation.curve import Curve
from vispress.errors import ConfigError

EVERY = 50
"""Steps between saved states."""


@dataclass(frozen=True, eq=False)
class Unfinished:
    """Keep parameters, the optimiser and the curve while training goes on.

    Args:
        file: Where; None keeps nothing.
        settings: Plain data that must be equal for training to go on.
    """

    file: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def restore(self, module: nn.Module, optimizer: torch.optim.Optimizer, curve: Curve) -> int:
        """Go on from the file, if there is one.

        Returns:
            Steps that are done.

        Raises:
            ConfigError: It is of other settings, or damaged.
        """
        if self.file is None or not self.file.exists():
            return 0
        try:
            with safe_open(self.file, "pt") as opened:
                told = json.loads(opened.metadata()["training"])
            tensors = load_file(self.file)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{self.file} cannot be read ({error}); delete it") from error
        self._check(told["settings"])
        own = dict(module.named_parameters())
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[f"parameter.{name}"])
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            kind, number, *rest = name.split(".")
            if kind == "optimizer":
                state.setdefault(int(number), {})[rest[0]] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        curve.loss[:], curve.held_out[:] = told["loss"], told["held_out"]
        return len(curve.loss)

    def note(self, module: nn.Module, optimizer: torch.optim.Optimizer, curve: Curve) -> None:
        """Write the state where enough steps were done since the last time, atomically.

        Raises:
            ConfigError: The file cannot be written.
        """
        if self.file is None or len(curve.loss) % EVERY:
            return
        tensors = {f"parameter.{n}": p.detach().contiguous() for n, p in module.named_parameters()}
        for number, entry in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": value for name, value in entry.items()}
        told = {"settings": self._plain(), "loss": curve.loss, "held_out": curve.held_out}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            part = self.file.with_suffix(".part")
            part.write_bytes(save(tensors, {"training": json.dumps(told)}))
            part.replace(self.file)
        except OSError as error:
            raise ConfigError(f"cannot write {self.file}: {error.strerror or error}") from error

    def clear(self) -> None:
        """Take the file away: training is done."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def _check(self, before: Mapping[str, Any]) -> None:
        now = self._plain()
        if differs := [n for n in sorted({*before, *now}) if before.get(n) != now.get(n)]:
            name = differs[0]
            raise ConfigError(
                f"{self.file} is of a training that was stopped with {name}={before.get(name)!r}, "
                f"and now it is {now.get(name)!r}; give it as it was, another folder, or delete it"
            )

    def _plain(self) -> dict[str, Any]:
        plain: dict[str, Any] = json.loads(json.dumps(dict(self.settings), default=str))
        return plain
