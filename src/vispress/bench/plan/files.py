"""Where plans are found. Nothing heavy is imported here."""

from pathlib import Path

from vispress.checks import suggest
from vispress.errors import ConfigError
from vispress.yaml_files import shipped_files


def plan_path(name: str) -> Path:
    """Find the file of a plan: a path, or the name of a shipped one.

    Raises:
        ConfigError: There is neither.
    """
    if (path := Path(name)).is_file():
        return path
    shipped = shipped_files("bench")
    if name not in shipped:
        raise ConfigError(f"no plan {name!r}: no such file, and {suggest(name, sorted(shipped))}")
    return shipped[name]
