"""The versions this library works with, and the check that says so."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version

from vispress.errors import UnsupportedVersionError

SUPPORTED = {"torch": ">=2.11", "transformers": ">=5.17,<6"}
"""Ranges of `pyproject.toml` that decide whether the runtime works."""


def check_versions() -> None:
    """Refuse versions outside the supported ranges.

    Raises:
        UnsupportedVersionError: Names package, version and range.
    """
    for name, supported in SUPPORTED.items():
        _check(name, supported)


def check_version(name: str) -> str:
    """The installed version of one of `SUPPORTED`.

    Raises:
        UnsupportedVersionError: It is missing or outside its range.
    """
    return _check(name, SUPPORTED[name])


@cache  # reading what is installed takes as long as the rest of compress_model
def _check(name: str, supported: str) -> str:
    from packaging.specifiers import SpecifierSet

    try:
        found = version(name)
    except PackageNotFoundError as error:
        raise UnsupportedVersionError(
            f"{name} is not installed; vispress needs {name}{supported}"
        ) from error
    # local builds and pre-releases count as their release
    if not SpecifierSet(supported).contains(found.partition("+")[0], prereleases=True):
        raise UnsupportedVersionError(
            f"{name} {found} is outside the supported range {supported}; "
            f"install one with: pip install '{name}{supported}'"
        )
    return found
