"""G-Search: the least keep rate of each layer, from shallow to deep, without loss.

From secondary descriptions of arXiv:2412.00556 (CVPR 2025), as is P-Sigmoid beside it; what these
leave open is ours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from vispress.bench.search.objective import ScheduleObjective, SearchResult
from vispress.bench.search.sigmoid import Unit, search_sigmoid, sigmoid_of
from vispress.bench.search.withdrawal import candidates, search_withdrawal
from vispress.config import make_compressor
from vispress.errors import ConfigError
from vispress.methods import Layerwise
from vispress.methods.base import Compressor
from vispress.registry import get_method, list_methods

GRID: Final = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.0)
"""Rates that the greedy search tries."""


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """A search to run; its options are checked before there is a model.

    Args:
        withdraws: Withdrawal: the layer of VTW is searched.
        make: Greedy: the method that follows rates by layer.
        grid: Greedy: rates to try.
        host: Sigmoid: hyper-parameters that are not searched.
        unit: Sigmoid: of the share; None for the others.
        share: Sigmoid: the budget, in `(0, 1]`.
        tolerance: Greedy and withdrawal: what may be lost.
        trials: Sigmoid: how many.
        seed: Sigmoid: of the trials.
    """

    withdraws: bool = False
    make: Callable[[Sequence[float]], Compressor] | None = None
    grid: tuple[float, ...] = ()
    host: Layerwise | None = None
    unit: Unit | None = None
    share: float = 1.0
    tolerance: float = 0.005
    trials: int = 40
    seed: int = 0

    @classmethod
    def of(
        cls, name: str, options: dict[str, Any], unit: Unit | None, share: float, **rest: Any
    ) -> "SearchRequest":
        """Request a greedy search of a method's schedule, or a sigmoid where a budget has a unit.

        Raises:
            ConfigError: The method has no such schedule, or an option does not fit.
        """
        if unit is not None:
            return cls(host=sigmoid_of(name, **options), unit=unit, share=share, **rest)
        make = scheduled(name, **options)
        make([1.0, 1.0])  # refuses options that do not fit
        return cls(make=make, grid=grid_for(name), **rest)

    @property
    def words(self) -> str:
        """The request in words, for the head of the file."""
        if self.withdraws:
            return f"withdrawal, tolerance {self.tolerance:g}"
        if self.unit is None:
            return f"greedy, tolerance {self.tolerance:g}"
        return f"sigmoid, {self.share:g} of {self.unit}"

    def most(self, num_layers: int) -> int:
        """Count the schedules that are tried, at most."""
        if self.withdraws:
            return len(candidates(num_layers))
        return self.trials if self.make is None else greedy_steps(num_layers, self.grid)

    def search(self, objective: ScheduleObjective, storage: Path | None = None) -> SearchResult:
        """Search as requested; see `search_greedy`, `search_sigmoid` and `search_withdrawal`."""
        if self.withdraws:
            return search_withdrawal(objective, tolerance=self.tolerance)
        if self.make is not None:
            return search_greedy(objective, self.make, tolerance=self.tolerance, grid=self.grid)
        assert self.unit is not None
        return search_sigmoid(
            objective,
            self.share,
            self.unit,
            trials=self.trials,
            seed=self.seed,
            storage=storage,
            method=self.host,
        )


def scheduled(name: str, **options: Any) -> Callable[[Sequence[float]], Compressor]:
    """Make a method that takes `layers` and `ratios` follow a rate for every layer.

    Args:
        name: Of the method.
        **options: Its other hyper-parameters.

    Raises:
        ConfigError: The method has no such schedule, or an option does not fit.
    """
    names = {field.name for field in fields(get_method(name))}
    if not {"layers", "ratios"} <= names:
        known = [
            other
            for other in list_methods()
            if {"layers", "ratios"} <= {field.name for field in fields(get_method(other))}
        ]
        raise ConfigError(f"{name} has no layers and ratios to search; have: {', '.join(known)}")
    for key in ("layers", "ratios", "keep_ratio", "num_tokens", "mean_keep_ratio"):
        if key in options:
            raise ConfigError(f"{key} is what the search finds; leave it out")
    if name == Layerwise.name and (of_sigmoid := {"steepness", "midpoint", "floor"} & set(options)):
        raise ConfigError(f"{', '.join(sorted(of_sigmoid))} is of a sigmoid, not of rates by layer")

    def make(rates: Sequence[float]) -> Compressor:
        changes = [layer for layer, (a, b) in enumerate(pairwise(rates), 1) if b != a]
        layers = changes or [1]
        ratios = [rates[layer] for layer in layers]
        return make_compressor(name, layers=layers, ratios=ratios, **options)

    return make


def grid_for(name: str) -> tuple[float, ...]:
    """List the rates that a method takes: only Layerwise can drop all tokens."""
    return GRID if name == Layerwise.name else tuple(rate for rate in GRID if rate)


def search_greedy(
    objective: ScheduleObjective,
    make: Callable[[Sequence[float]], Compressor],
    *,
    tolerance: float = 0.005,
    grid: Sequence[float] = GRID,
) -> SearchResult:
    """Find the least rate of each layer, from shallow to deep, that is still good enough.

    A rate is tried with all deeper layers at the same rate, since what is dropped does not come
    back, and found by bisection: a metric that falls with every rate is taken for granted.

    Args:
        objective: Values schedules.
        make: From `scheduled`.
        tolerance: Share of accuracy or loyalty that may be lost, or nats of KL.
        grid: Rates to try, with 1.0.

    Raises:
        ConfigError: The tolerance or a rate is out of range.
    """
    if 1.0 not in grid or any(not 0.0 <= rate <= 1.0 for rate in grid):
        raise ConfigError(f"grid must hold 1.0 and rates in [0, 1], got {list(grid)}")
    least = objective.least(tolerance)
    rates = [1.0] * objective.num_layers
    for layer in range(1, objective.num_layers):
        tries = sorted(rate for rate in set(grid) if rate <= rates[layer])
        low, high = 0, len(tries) - 1  # the highest is what was good enough before
        while low < high:
            middle = (low + high) // 2
            tried = [*rates[:layer], *[tries[middle]] * (objective.num_layers - layer)]
            value = objective.value(make(tried), f"layer {layer} at {tries[middle]:g}")
            low, high = (low, middle) if value >= least else (middle + 1, high)
        rates[layer:] = [tries[high]] * (objective.num_layers - layer)
    return SearchResult.of(objective, make(rates))


def greedy_steps(num_layers: int, grid: Sequence[float] = GRID) -> int:
    """Count the schedules that `search_greedy` values at most."""
    return (num_layers - 1) * (len(grid) - 1).bit_length()
