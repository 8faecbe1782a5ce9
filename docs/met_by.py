"""Which laws meet a method, from the parameters of their tests: for `docs/generate.py`."""

import re
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import tests.laws.selection as selection

ROOT: Final = Path(__file__).parents[1]


@cache
def _laws() -> dict[str, set[int]]:
    """Laws by the methods that their tests name, in the whole product of methods and families."""
    default = selection.chosen
    # which cases run by default is worked out by forwards, and does not matter here
    selection.chosen = lambda *_, **__: set()
    try:
        found: dict[str, set[int]] = {}
        for path in sorted((ROOT / "tests" / "laws").glob("test_law[0-9]*.py")):
            for method in _methods_of(import_module(f"tests.laws.{path.stem}")):
                found.setdefault(method, set()).add(int(path.stem[8:10]))
    finally:
        selection.chosen = default
    return found


def _methods_of(module: Any) -> set[str]:
    """Methods that a law's parametrised tests take by name."""
    found = set()
    for test in vars(module).values():
        for mark in getattr(test, "pytestmark", ()):
            if mark.name != "parametrize":
                continue
            names = mark.args[0]
            names = [n.strip() for n in names.split(",")] if isinstance(names, str) else names
            if "method" in names:
                place = list(names).index("method")
                values = [getattr(case, "values", case) for case in mark.args[1]]
                found |= {value[place] if len(names) > 1 else value for value in values}
    return {name for name in found if isinstance(name, str)}


def laws_of(name: str) -> list[tuple[int, str]]:
    """Numbers of the laws that meet a method by name, and their anchors in the page of laws."""
    text = (ROOT / "docs" / "laws.md").read_text(encoding="utf-8")
    anchors = {
        int(number): f"{number}-{re.sub(r'[^a-z0-9 -]', '', title.lower()).replace(' ', '-')}"
        for number, title in re.findall(r"^## (\d+)\. (.+)$", text, re.MULTILINE)
    }
    return [(law, anchors[law]) for law in sorted(_laws().get(name, ()))]
