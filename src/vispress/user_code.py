"""Run a user's own Python files, which register methods, tasks or adapters.

Only files that the user names are run: on the command line (`--import`), or in a plan of theirs.
A results folder names its run's files, but nothing runs them again unasked.
"""

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

from vispress.errors import ConfigError, VispressError

_PREFIX = "vispress_user_"


def import_files(paths: Iterable[str | Path], base: Path | None = None) -> dict[str, str]:
    """Run Python files, once each in a process.

    Args:
        paths: The files.
        base: Folder that relative paths start at, if they are there; else the working directory.

    Returns:
        The beginning of each file's SHA-256 by its name: what was run.

    Raises:
        ConfigError: A file is missing, is no Python file, or fails; the message says where in it.
    """
    found = {}
    for path in paths:
        beside = (base or Path()) / path
        file = beside if beside.is_file() else Path(path)
        found[file.name] = import_file(file)
    return found


def import_file(path: Path) -> str:
    """Run a Python file, unless this process has; as `import_files`."""
    if path.suffix != ".py":
        raise ConfigError(f"only Python files can be imported (my_method.py), got {path}")
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot import {path}: {error.strerror or error}") from error
    mark = hashlib.sha256(source).hexdigest()[:16]
    name = f"{_PREFIX}{mark}"
    if name in sys.modules:
        return mark
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their own module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ConfigError(f"importing {path}{_line(error, path)}: {_words(error)}") from error
    return mark


def _line(error: BaseException, path: Path) -> str:
    """Where in the file it failed; a syntax error says so itself."""
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == path.absolute()]
    lines = lines or [frame.lineno for frame in frames if Path(frame.filename) == path]
    return f", line {lines[-1]}" if lines else ""


def _words(error: BaseException) -> str:
    if isinstance(error, VispressError):
        return str(error)
    first = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {first}"
