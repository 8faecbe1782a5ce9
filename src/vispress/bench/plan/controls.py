"""The controls that stand beside the methods of every plan, and `all`: every published method."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal

from vispress.bench.plan.cells import BOUNDS, Entry, is_control
from vispress.checks import suggest
from vispress.errors import ConfigError
from vispress.methods.gist_evictor import GistEvictor
from vispress.registry import get_method, list_methods

Controls = Literal["standard", "none"]
Overrides = Mapping[str, Mapping[str, Any]]

ALL: Final = "all"
RANDOM: Final = "random"
SEEDS: Final = (0, 1, 2)
"""Draws of the random control; a plan may list more, never fewer."""

_AT_A_BUDGET: Final[tuple[Entry, ...]] = (
    {"method": RANDOM, "seeds": list(SEEDS)},
    # on the grid: along the raster, equal steps are stripes when they divide the row
    {"method": "uniform", "dims": 2},
    "avg_pool",
    "downsample",
    "oracle",
)


def expand(methods: Sequence[Entry], overrides: Overrides) -> Iterator[tuple[Entry, bool]]:
    """Spell out `all` among the entries of a plan, and tell whether each is one of `all`.

    Args:
        methods: As `Plan.methods`.
        overrides: As `Plan.overrides`.

    Raises:
        ConfigError: Overrides without `all`, or of something that is not one of it.
    """
    known = {name: get_method(name) for name in list_methods()}
    # questions of tasks have no gist tokens, and the models were not trained with any
    names = [
        name
        for name, method in known.items()
        if not (is_control(method) or method.evidence == "composition")
        and not issubclass(method, GistEvictor)
    ]
    if overrides and ALL not in methods:
        raise ConfigError("overrides are for the methods of `all`, which the plan does not list")
    for name, values in overrides.items():
        if name not in names:
            raise ConfigError(f"overrides: {name!r} is no method of `all`; {suggest(name, names)}")
        if not isinstance(values, Mapping):
            raise ConfigError(f"overrides: {name} must be a mapping, got {values!r}")
    for entry in methods:
        if entry == ALL:
            yield from (({"method": name, **overrides.get(name, {})}, True) for name in names)
        else:
            yield entry, False


def with_controls(methods: Sequence[Entry], *, budgets: bool) -> list[Entry]:
    """Add the missing standard controls to the entries of a plan.

    Args:
        methods: As `Plan.methods`.
        budgets: Whether the plan has keep ratios; controls at equal budget need one.

    Raises:
        ConfigError: Random is listed with fewer than three seeds.
    """
    entries = [_three_seeds(entry) for entry in methods]
    listed = {_group(entry) for entry in entries}
    standard = (*_AT_A_BUDGET, *BOUNDS) if budgets else BOUNDS
    return entries + [entry for entry in standard if _group(entry) not in listed]


def _three_seeds(entry: Entry) -> Entry:
    if entry != RANDOM and not (isinstance(entry, Mapping) and _group(entry) == RANDOM):
        return entry
    data = {"method": entry} if isinstance(entry, str) else dict(entry)
    seeds = data.get("seeds", list(SEEDS))
    if "seed" in data or not isinstance(seeds, list) or len(set(map(str, seeds))) < len(SEEDS):
        raise ConfigError(
            f"random needs a list of at least {len(SEEDS)} seeds to be a control, got {entry!r}; "
            "give them, or a label of its own, or say `controls: none`"
        )
    return data | {"seeds": seeds}


def _group(entry: Entry) -> str:
    """Name an entry as the table calls it."""
    if isinstance(entry, Mapping):
        return str(entry.get("label", entry.get("method")))
    return str(entry)
