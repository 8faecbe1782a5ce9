"""Values that a search has found, one line each, so that a stopped one goes on."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vispress.bench.results.files import cannot, parse_json
from vispress.bench.results.schema import anything, number, plain_fault, record, table, text

_NOTE = record({"identity": text(), "method": table(anything), "value": number()})


def read_notes(log: Path | None, identity: str) -> Iterator[tuple[str, float]]:
    """Schedules and values that an earlier run noted; a damaged line is valued anew.

    Raises:
        ResultsError: The file is there and cannot be read.
    """
    if log is None or not log.exists():
        return
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise cannot("read", log, error) from error
    for line in lines:
        try:
            note = parse_json(line)
        except ValueError:
            continue
        sound = (plain_fault(note) or _NOTE(note, "")) is None
        if sound and note["identity"] == identity:
            yield json.dumps(note["method"], sort_keys=True), float(note["value"])


def add_note(log: Path, identity: str, method: dict[str, Any], value: float) -> None:
    """Note a value, where it is finite; behind a line that was cut off, on a line of its own.

    Raises:
        ResultsError: It cannot be written.
    """
    if not math.isfinite(value):
        return
    note = json.dumps({"identity": identity, "method": method, "value": value})
    try:
        cut = log.exists() and not log.read_bytes().endswith(b"\n")
        with log.open("a", encoding="utf-8") as file:
            file.write("\n" * cut + note + "\n")
    except OSError as error:
        raise cannot("write", log, error) from error
