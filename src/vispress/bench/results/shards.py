"""One run on several processes, as `accelerate launch` and `torchrun` start them.

Processes meet once, when the first of them opens the results folder; after that they share nothing
but the folder, where each claims the next cell. So one that dies takes no other with it.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any

import torch

from vispress.errors import ConfigError

_MEET = timedelta(minutes=30)
"""How long processes wait for each other to load the model."""
_MEETINGS = count()


@dataclass(frozen=True)
class Shard:
    """One process of a run.

    Args:
        rank: From 0; the first one opens the folder and writes the summary.
        world: How many processes there are.
        local_rank: Among those of this machine.
        local_world: How many processes this machine has.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def leader(self) -> bool:
        """Whether this process opens the folder and reports."""
        return self.rank == 0

    def device(self, device: str | torch.device) -> str | torch.device:
        """Choose the device: `"cuda"` is a GPU of its own for each process of a machine.

        Raises:
            ConfigError: Each of several processes would spread its model over the same devices.
        """
        if str(device) == "auto" and self.local_world > 1 and (have := torch.cuda.device_count()):
            raise ConfigError(
                f"device auto spreads the model over all {have} GPUs of a machine, and this one "
                f"has {self.local_world} processes that would all take them; start one a machine, "
                "or give cuda, which is a GPU for each"
            )
        return f"cuda:{self.local_rank}" if self.world > 1 and str(device) == "cuda" else device

    def tell(self, problem: str | None) -> None:
        """Say how opening the folder went, and wait until all have heard it (the leader).

        Raises:
            ConfigError: The others do not come.
        """
        if self.world > 1:
            with _meeting():
                store, key = _store(self), f"vispress/opened/{next(_MEETINGS)}"
                store.set(key, problem or "")
                store.wait([f"{key}/{rank}" for rank in range(1, self.world)], _MEET)

    def hear(self) -> str | None:
        """Hear how opening the folder went, None for well (the other processes).

        Raises:
            ConfigError: The leader does not come.
        """
        with _meeting():
            store, key = _store(self), f"vispress/opened/{next(_MEETINGS)}"
            problem: str = store.get(key).decode()
            store.set(f"{key}/{self.rank}", "heard")
        return problem or None


def this_shard(variables: Mapping[str, str] | None = None) -> Shard:
    """Find out which process this is, from the launcher's environment variables.

    Args:
        variables: In place of the process's environment.

    Raises:
        ConfigError: They are incomplete or no numbers.
    """
    environment = os.environ if variables is None else variables
    if environment.get("WORLD_SIZE", "1") == "1":
        return Shard()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE={environment['WORLD_SIZE']} announces several processes, but "
            f"{', '.join(missing)} is not set; start them with accelerate launch or torchrun"
        )
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    usual = {"LOCAL_RANK": environment["RANK"], "LOCAL_WORLD_SIZE": "1"}
    try:
        rank, world, local, local_world = (int({**usual, **environment}[name]) for name in names)
    except ValueError as error:
        raise ConfigError(f"{', '.join(names)} must be integers: {error}") from error
    if not 0 <= rank < world:
        raise ConfigError(f"RANK must be in [0, {world}), got {rank}")
    return Shard(rank, world, local, local_world)


@contextmanager
def _meeting() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise ConfigError(
            f"the processes of this run did not meet at {where} within {_MEET}: {error}. Look for "
            "the first error of another process"
        ) from error


@cache
def _store(shard: Shard) -> Any:
    """Open a key-value store at the launcher's address."""
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", shard.rank, shard.world, timeout=_MEET))
    return store
