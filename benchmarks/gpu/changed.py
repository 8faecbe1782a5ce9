"""What changed since the last run on a GPU: it is checked first, and what did not is not repeated.

A part that checks code keeps a digest of the source of each subject; the results that are committed
for this device hold those of the last run.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.gpu.record import ROOT, Row, Settings, read_json

DIGITS = 12


def digest(paths: Iterable[Path]) -> str:
    """Twelve digits of Python files, and of those below folders."""
    found = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            found.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return found.hexdigest()[:DIGITS]


@cache
def of_kernel_tests(name: str) -> str:
    """A test file of `tests/kernels` and what it runs: an op's folder, and what ops share."""
    package = ROOT / "kernels" / "vispress_kernels"
    folder = package / name
    own = [folder] if folder.is_dir() else sorted(p for p in package.iterdir() if p.is_dir())
    shared = sorted(package.glob("*.py"))
    return digest([*own, *shared, ROOT / "tests" / "kernels" / f"test_{name}.py"])


@cache
def of_method(method: str) -> str:
    """A method's classes."""
    from vispress.registry import get_method

    files = {Path(inspect.getfile(c)) for c in get_method(method).__mro__ if _ours(c)}
    return digest(sorted(files))


@cache
def of_runtime() -> str:
    """What every method runs through, kernels too, and what judges it."""
    source, laws = ROOT / "src" / "vispress", ROOT / "tests" / "laws"
    judges = [ROOT / "benchmarks" / "gpu" / "laws.py", laws / "oracle.py", laws / "cases.py"]
    runs = [source / "runtime", source / "adapters", ROOT / "kernels" / "vispress_kernels"]
    return digest([*runs, *judges])


def _ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "vispress"


def last_run(part: str, settings: Settings) -> dict[str, Any]:
    """The file of a part that is committed for this device and these versions; empty for none.

    What this very code began is none: the part goes on with it by itself.
    """
    known = read_json(settings.committed / f"{part}.json") if settings.committed else None
    same = ("device", "cuda", "versions", "dry_run")
    found, own = (known or {}).get("identity", {}), settings.identity
    if not found or found == own or any(found.get(key) != own.get(key) for key in same):
        return {}
    return known or {}


def changed(known: Mapping[str, Any], digests: Mapping[str, str]) -> set[str]:
    """Subjects whose source is not that of the last run, or that it has nothing of."""
    before = known.get("extra", {}).get("digests", {})
    return {name for name, own in digests.items() if before.get(name) != own}


def carried(known: Mapping[str, Any], good: Callable[[Row], bool]) -> dict[str, Row]:
    """Rows of the last run that were good, by name; each says which commit it is of."""
    commit = known.get("identity", {}).get("commit")
    return {row["name"]: {"as_of": commit} | row for row in known.get("rows", []) if good(row)}
