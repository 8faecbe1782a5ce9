"""P-Sigmoid: the best sigmoid under a budget, by Bayesian optimisation (optuna)."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal, get_args

from vispress.bench.search.objective import ScheduleObjective, SearchResult
from vispress.budget import check_ratio
from vispress.checks import check_choice, check_integer
from vispress.config import make_compressor
from vispress.errors import BudgetError, ConfigError
from vispress.methods import Layerwise
from vispress.methods._parts.schedules.layer_ratios import solve_sigmoid

STEEPNESS, FLOOR = (2.0, 40.0), (0.0, 0.1)
"""What is tried; the midpoint follows from the budget."""
STARTS: Final = 8
"""Trials before a model of the metric is fitted."""

Unit = Literal["tokens", "flops"]


def sigmoid_of(name: str, **options: Any) -> Layerwise:
    """Make the method of a sigmoid search, with hyper-parameters that it does not look for.

    Raises:
        ConfigError: Another method, or an option that the search looks for or that does not fit.
    """
    if name != Layerwise.name:
        raise ConfigError(f"a sigmoid is a schedule of {Layerwise.name}, not of {name}")
    for key in ("layers", "ratios", "midpoint", "floor", "keep_ratio", "num_tokens"):
        if key in options:
            raise ConfigError(f"{key} is what the search finds; leave it out")
    made = make_compressor(name, **options)
    assert isinstance(made, Layerwise)
    return made


def search_sigmoid(
    objective: ScheduleObjective,
    share: float,
    unit: Unit = "tokens",
    *,
    trials: int = 40,
    seed: int = 0,
    storage: Path | None = None,
    method: Layerwise | None = None,
) -> SearchResult:
    """Find the best steepness and floor under a budget, by Bayesian optimisation (optuna).

    Expected improvement under a Gaussian process (Matern 5/2), after 8 random trials; the first is
    the default steepness, so that what is found is never worse on the calibration questions.

    Args:
        objective: Values schedules.
        share: Of visual tokens (mean over layers) or of their FLOPs, in `(0, 1]`.
        unit: Of `share`.
        trials: Schedules to value, those of an earlier run included.
        seed: Of the trials.
        storage: Journal file of the trials; a run that was stopped goes on.
        method: Other hyper-parameters.

    Raises:
        ConfigError: optuna is missing, or a value is out of range.
        BudgetError: No trial could meet the budget.
    """
    check_ratio("share", share)
    check_choice("unit", unit, get_args(Unit))
    check_integer("trials", trials, low=1)
    check_integer("seed", seed, low=0)
    host = Layerwise() if method is None else method
    study = _study(objective, host, share, unit, seed, storage)
    done = sum(trial.state.is_finished() for trial in study.trials)
    if done == 0:
        study.enqueue_trial({"steepness": host.steepness, "floor": FLOOR[0]})

    def trial_value(trial: Any) -> float:
        steepness = trial.suggest_float("steepness", *STEEPNESS, log=True)
        floor = trial.suggest_float("floor", *FLOOR)
        try:
            made = _solved(objective, host, steepness, floor, share, unit)
        except BudgetError as error:
            raise _optuna().TrialPruned(str(error)) from error
        return objective.value(made, f"trial {trial.number}")

    study.optimize(trial_value, n_trials=max(0, trials - done))
    if not any(trial.value is not None for trial in study.trials):
        raise BudgetError(
            f"none of {len(study.trials)} sigmoids meets {share:g} of {unit} in "
            f"{objective.num_layers} layers: ask for more"
        )
    best = study.best_trial.params
    return SearchResult.of(
        objective, _solved(objective, host, best["steepness"], best["floor"], share, unit)
    )


def _solved(
    objective: ScheduleObjective,
    host: Layerwise,
    steepness: float,
    floor: float,
    share: float,
    unit: Unit,
) -> Layerwise:
    """Solve for the sigmoid of that shape that costs the share."""

    def cost(rates: Sequence[float]) -> float:
        if unit == "tokens":
            return sum(rates) / len(rates)
        return objective.flops_of([rate * objective.num_visual for rate in rates])

    midpoint, floor = solve_sigmoid(steepness, floor, objective.num_layers, cost, share)
    return replace(host, steepness=steepness, midpoint=midpoint, floor=floor)


def _study(
    objective: ScheduleObjective,
    host: Layerwise,
    share: float,
    unit: Unit,
    seed: int,
    storage: Path | None,
) -> Any:
    optuna = _optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kept = None
    if storage is not None:
        backend = optuna.storages.journal.JournalFileBackend(str(storage))
        kept = optuna.storages.JournalStorage(backend)
    study = optuna.create_study(
        study_name=f"{objective.identity}-{share:g}-{unit}-{seed}-{host.queries}-{host.steepness:g}",
        storage=kept,
        direction="maximize",
        load_if_exists=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # a run that goes on must not draw its first trials again
        study.sampler = optuna.samplers.GPSampler(
            seed=seed + len(study.trials), n_startup_trials=STARTS, deterministic_objective=True
        )
    return study


def _optuna() -> Any:
    try:
        import optuna
        import scipy  # noqa: F401  (of its Gaussian process)
    except ImportError as error:
        raise ConfigError(
            f"{error.name} is missing; run: pip install 'vispress[search]'"
        ) from error
    return optuna
