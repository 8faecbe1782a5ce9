"""Notebooks of `examples/notebooks/` run from top to bottom, and what they show can be shown."""

import ast
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib as mpl
import pytest

from vispress import registry

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples" / "notebooks").glob("*.ipynb"))
SHOWN = {"tour": 3, "your_picture": 0, "own_method": 1}
"""Reports and pictures that cells end with, which a notebook draws as HTML."""


def cells_of(path: Path) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def run_cell(source: str, name: str, names: dict[str, object]) -> object:
    """Run a cell; the value of its last line, as a notebook has it."""
    tree = ast.parse(source, name)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), names)
    if not isinstance(last, ast.Expr):
        return None
    return eval(compile(ast.Expression(last.value), name, "eval"), names)


@pytest.mark.slow(cases=3)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    mpl.use("Agg")
    registry.list_methods()  # loads ours: what a notebook adds goes again
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setitem(sys.modules, "notebook", ModuleType("notebook"))
    names: dict[str, object] = {"__name__": "notebook"}
    shown = 0
    for number, cell in enumerate(cells_of(path)):
        found = run_cell("".join(cell["source"]), f"{path.stem}, code cell {number}", names)
        if hasattr(found, "_repr_html_"):
            assert "<" in found._repr_html_()
            shown += 1
    assert shown == SHOWN[path.stem]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_kept_without_outputs(path: Path) -> None:
    assert all(not cell["outputs"] and not cell["execution_count"] for cell in cells_of(path))


def test_a_cell_that_raises_is_noticed() -> None:
    with pytest.raises(ZeroDivisionError):
        run_cell("x = 1\nx / 0", "a cell", {})
