"""Results of one part: rows measured one by one under a time budget, kept in one JSON file."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]


class Deadline:
    """A span of time that is asked about between measurements.

    Args:
        seconds: Its length; 0 or less has passed already.
        now: The clock.
    """

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._start, self.seconds = now, now(), seconds

    @property
    def used(self) -> float:
        """Seconds since the start."""
        return self._now() - self._start

    @property
    def left(self) -> float:
        """Seconds left, not below 0."""
        return max(0.0, self.seconds - self.used)

    @property
    def passed(self) -> bool:
        """Whether nothing is left."""
        return self.left <= 0


@dataclass(frozen=True)
class Settings:
    """What every part is told.

    Args:
        device: Where to run.
        out: Folder of the JSON files.
        dry: Tiny sizes, to see that everything runs and what the files look like.
        identity: Commit, source, device and versions; rows of another identity are not reused.
        force: Measure again what is there already.
        committed: Folder of the results of the last run on such a device, or None.
    """

    device: torch.device
    out: Path
    dry: bool
    identity: dict[str, Any]
    force: bool = False
    committed: Path | None = None


class Part:
    """One part of the suite and its file, which is written while rows come in.

    A part of the same identity is taken up where it stopped; rows that failed or were cut short are
    tried again.

    Args:
        name: Of the part, and of its file.
        settings: Of the run.
        deadline: Checked before every row.
        depends: What else the rows depend on, beside the settings' identity.
    """

    def __init__(
        self,
        name: str,
        settings: Settings,
        deadline: Deadline,
        depends: dict[str, Any] | None = None,
    ) -> None:
        self.name, self.settings, self.deadline = name, settings, deadline
        self.path = settings.out / f"{name}.json"
        self.identity = settings.identity | (depends or {})
        self.rows: list[Row] = []
        self.not_reached: list[str] = []
        self.extra: dict[str, Any] = {}
        self.complete = False
        self.used = self._saved = 0.0
        known = None if settings.force else read_json(self.path)
        if known is not None and known.get("identity") == self.identity:
            self.complete = bool(known.get("complete"))
            self.rows = [r for r in known["rows"] if self.complete or not _unfinished(r)]
            self.extra, self.used = known.get("extra", {}), float(known.get("used_s", 0.0))

    def row(self, name: str, measure: Callable[[], Row]) -> Row | None:
        """Measure one row, unless it is there or the time is up; an error becomes the row.

        Returns:
            The row, or None where it was not reached.
        """
        known = self.find(name)
        if known is not None:
            return known
        if self.deadline.passed:
            self.not_reached.append(name)
            return None
        row = measured(name, measure)
        self.add(row)
        return row

    def add(self, row: Row) -> None:
        """Keep a row that was measured elsewhere, too."""
        self.rows.append(row)
        # many quick rows are not written one by one
        if len(self.rows) < 50 or time.perf_counter() - self._saved > 1:
            self.save()

    def find(self, name: str) -> Row | None:
        """A row by its name, or None."""
        return next((row for row in self.rows if row["name"] == name), None)

    def finish(self) -> None:
        """Write the file for the last time; it is complete when every row was reached."""
        self.complete = not self.not_reached
        self.save()

    def save(self) -> None:
        """Write the file in one step."""
        self.used = self.deadline.used
        data = {
            "part": self.name,
            "identity": self.identity,
            "complete": self.complete,
            "used_s": round(self.used, 2),
            "budget_s": round(self.deadline.seconds, 2),
            "extra": self.extra,
            "rows": self.rows,
            "not_reached": self.not_reached,
        }
        write_json(self.path, data)
        self._saved = time.perf_counter()


def measured(name: str, measure: Callable[[], Row]) -> Row:
    """A row by its name; an error becomes the row."""
    start = time.perf_counter()
    try:
        found = measure()
    except torch.OutOfMemoryError:
        found = {"error": "out of memory"}
    except Exception as error:  # one broken measurement must not cost the others
        found = {"error": f"{type(error).__name__}: {error}"[:600]}
    return {"name": name, **found, "took_s": round(time.perf_counter() - start, 3)}


def _unfinished(row: Row) -> bool:
    return "error" in row or bool(row.get("cut_short"))


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, p20 and p80 (linear between values), and how many there were."""
    if not values:
        raise ValueError("quantiles need at least one value")
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return {"median": at(0.5), "p20": at(0.2), "p80": at(0.8), "n": len(ordered)}


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is none that can be read."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rest = path.with_suffix(f".{os.getpid()}.tmp")
    rest.write_text(json.dumps(data, indent=1) + "\n")
    rest.replace(path)


def source_hash(root: Path = ROOT) -> str:
    """Twelve digits that change with the code that is measured, where no commit is known."""
    digest = hashlib.sha256()
    for folder in ("src", "kernels", "benchmarks", "tests/kernels", "tests/laws", "configs"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".yaml"):
                digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def identity(device: torch.device, dry: bool) -> dict[str, Any]:
    """What a result is tied to: commit (or VISPRESS_COMMIT), source, device and versions."""
    from vispress.bench.plan.provenance import commit, device_name, versions

    return {
        "commit": os.environ.get("VISPRESS_COMMIT") or commit(),
        "source": source_hash(),
        "device": device_name(device),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "versions": versions(),
        "dry_run": dry,
    }
