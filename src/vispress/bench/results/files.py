"""JSON and text files: written whole or not at all, read with every fault named."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from vispress.bench.results.schema import plain_fault
from vispress.errors import VispressError


class ResultsError(VispressError, OSError):
    """A results folder cannot be used: not writable, in use, damaged, or of another run."""


class DamagedFileError(ResultsError):
    """A file of a results folder is not what a run wrote; the message says what is wrong in it."""


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file so that a reader sees all of it or none.

    Raises:
        ResultsError: It cannot be written.
    """
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """As `write_json`, for any text."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)  # noqa: PTH105  (the atomic one)
    except OSError as error:
        # where there is no folder, or none to write to, there is nothing to remove either
        with suppress(OSError):
            temporary.unlink()
        raise cannot("write", path, error) from error


def load_json(
    path: Path, check: Callable[[dict[str, Any]], str | None], remedy: str
) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no file.

    Args:
        path: The file.
        check: What is wrong with its content, or None.
        remedy: What works where something is.

    Raises:
        DamagedFileError: It holds something else, a name twice, a number that is not finite, data
            nested too deep, or what the check refuses.
        ResultsError: It cannot be read.
    """
    try:
        data = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise cannot("read", path, error) from error
    except ValueError as error:
        raise DamagedFileError(f"{path} is damaged: it is no JSON: {error}; {remedy}") from error
    fault = "it is no JSON object" if not isinstance(data, dict) else plain_fault(data)
    if fault is None:
        fault = check(data)
    if fault is not None:
        raise DamagedFileError(f"{path} is damaged: {fault}; {remedy}")
    checked: dict[str, Any] = data
    return checked


def parse_json(text: str) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: It is no JSON, is nested too deep, has NaN or an infinity, or a name twice.
    """
    try:
        return json.loads(text, parse_constant=_not_finite, object_pairs_hook=_each_once)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def cannot(what: str, path: Path, error: OSError) -> ResultsError:
    """The error for a file that the system refuses to read, write or lock."""
    return ResultsError(
        f"cannot {what} {path}: {error.strerror or error}. Finished cells are safe; the same "
        "command goes on from there"
    )


def _not_finite(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"a name stands twice: {max(names, key=names.count)!r}")
    return found
