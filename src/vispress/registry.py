"""Methods by name: built in, registered by users, or found through entry points.

Each says by `evidence` what it follows, in the words that `vispress.kinds.EVIDENCE` defines.
"""

import difflib
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, TypeVar

from vispress.errors import ConfigError, UnsupportedMethodError

if TYPE_CHECKING:
    from vispress.methods.base import Compressor

C = TypeVar("C", bound="type[Compressor]")

ENTRY_POINT_GROUP = "vispress.methods"

_METHODS: dict[str, "type[Compressor]"] = {}
_loaded_entry_points = False


def register_method(name: str) -> Callable[[C], C]:
    """Class decorator: make a compressor available as `method=name`.

    Args:
        name: Lower-case identifier, unique.

    Raises:
        ConfigError: The name is malformed or taken by another class.
    """
    if not name.isidentifier() or name != name.lower():
        raise ConfigError(f"method name must be a lower-case identifier, got {name!r}")

    def add(cls: C) -> C:
        known = _METHODS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (
            cls.__module__,
            cls.__qualname__,
        ):
            raise ConfigError(f"method {name!r} is already registered by {known.__module__}")
        cls.name = name
        _METHODS[name] = cls
        return cls

    return add


def get_method(name: str) -> "type[Compressor]":
    """The compressor class registered under `name`.

    Raises:
        UnsupportedMethodError: No such method; the message suggests close names.
    """
    _load()
    check_known(name, _METHODS)
    return _METHODS[name]


def check_known(name: str, known: Iterable[str]) -> None:
    """Refuse a method's name that is not among known ones.

    Raises:
        UnsupportedMethodError: No such method; the message suggests close names.
    """
    if name not in (names := sorted(known)):
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
        raise UnsupportedMethodError(f"unknown method {name!r}; {hint}known: {', '.join(names)}")


def list_methods() -> list[str]:
    """Names of all registered methods, sorted."""
    _load()
    return sorted(_METHODS)


def _load() -> None:
    """Import the built-in methods, then third-party ones, once."""
    global _loaded_entry_points
    import vispress.methods  # noqa: F401  (registers the built-in ones)

    if not _loaded_entry_points:
        _loaded_entry_points = True
        for entry in entry_points(group=ENTRY_POINT_GROUP):
            entry.load()
