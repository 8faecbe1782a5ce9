"""Checks of hyper-parameters; every message names the field, its range and the value received."""

import difflib
from collections.abc import Collection, Iterable, Sequence

from vispress.errors import ConfigError


def suggest(name: object, known: Iterable[str]) -> str:
    """End an error message: the closest name, then all of them."""
    names = list(known)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names)}"


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Refuse a value that is none of `choices`.

    Raises:
        ConfigError: The value is not among them.
    """
    if isinstance(value, bool) or value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_integer(name: str, value: object, *, low: int | None = None) -> None:
    """Refuse anything but an integer of at least `low`.

    Raises:
        ConfigError: Another type, or too small.
    """
    if isinstance(value, bool) or not isinstance(value, int) or (low is not None and value < low):
        bound = "" if low is None else f" >= {low}"
        raise ConfigError(f"{name} must be an integer{bound}, got {value!r}")


def check_number(name: str, value: object, *, low: float, high: float = float("inf")) -> None:
    """Refuse anything but a finite number in `[low, high]`.

    Raises:
        ConfigError: Another type, or out of range.
    """
    ok = isinstance(value, int | float) and not isinstance(value, bool)
    if not ok or not low <= value < float("inf") or value > high:  # type: ignore[operator]
        raise ConfigError(f"{name} must be a number in [{low}, {high}], got {value!r}")


def check_ascending(name: str, values: Sequence[object], *, low: int) -> None:
    """Refuse anything but a non-empty, strictly ascending run of integers from `low` up.

    Raises:
        ConfigError: Empty, another type, too small, or out of order.
    """
    if not isinstance(values, tuple) or not values:
        raise ConfigError(f"{name} must be a non-empty tuple of integers, got {values!r}")
    for value in values:
        check_integer(name, value, low=low)
    if list(values) != sorted(set(values)):
        raise ConfigError(f"{name} must be strictly ascending, got {values!r}")


def check_flag(name: str, value: object) -> None:
    """Refuse anything but True and False.

    Raises:
        ConfigError: Another type.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, got {value!r}")


def check_layer(name: str, layer: int, num_layers: int, *, low: int = 1) -> None:
    """Refuse a decoder layer outside `[low, num_layers)`.

    Raises:
        ConfigError: The layer is out of range.
    """
    if isinstance(layer, bool) or not isinstance(layer, int) or not low <= layer < num_layers:
        raise ConfigError(f"{name} must be an integer in [{low}, {num_layers}), got {layer!r}")
