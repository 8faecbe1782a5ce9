"""YAML: one reader for files and values, the check of a mapping's keys, and the shipped files."""

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from vispress.checks import suggest
from vispress.errors import ConfigError


def read_yaml(path: str | os.PathLike[str], what: str = "") -> Any:
    """Read a YAML file.

    Args:
        path: The file.
        what: The file's role, for errors: `"the plan"`.

    Raises:
        ConfigError: It is missing, no text, no YAML, or nested too deep.
    """
    name = f"{what} {path}".strip()
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {name}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not valid YAML: {error}") from error
    return parse_yaml(text, name)


def parse_yaml(text: str, what: str) -> Any:
    """Parse YAML.

    Args:
        text: A document, or a single value.
        what: Its name, for errors.

    Raises:
        ConfigError: It is no YAML, or nested too deep.
    """
    import yaml

    try:
        return yaml.safe_load(text)
    # the parser calls itself for each level; a date such as 2020-13-45 is a plain ValueError
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise ConfigError(f"{what} is not valid YAML: {reason}") from error


def check_keys(
    data: Any, cls: type, where: str, *, written: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Copy a mapping whose keys are fields of a dataclass.

    Args:
        data: Parsed YAML.
        cls: The dataclass.
        where: The mapping's place, for errors.
        written: Keys of fields that YAML calls otherwise.

    Raises:
        ConfigError: It is no mapping, or has a key that is no field.
    """
    known = [(written or {}).get(field.name, field.name) for field in fields(cls)]
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} must be a mapping with the keys {', '.join(known)}")
    for key in data:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}; {suggest(key, known)}")
    return dict(data)


def shipped_files(kind: str) -> dict[str, Path]:
    """Find the shipped YAML files of one kind by name.

    Args:
        kind: A folder of `configs/`: `"bench"`, `"methods"` or `"tasks"`.
    """
    package = Path(__file__).parent
    # an installed package holds the configs; in a checkout they lie beside src/
    homes = (package.parents[1] / "configs" / kind, package / "configs" / kind)
    return {path.stem: path for home in homes for path in sorted(home.glob("*.yaml"))}
