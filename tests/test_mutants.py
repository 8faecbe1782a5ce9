"""Mutants are kept in step: each applies, changes one file of ours, and names tests that exist."""

import ast
import shutil
from pathlib import Path

import pytest

from tests.mutants import CODE, ROOT, Mutant, copy_code, mutants, read

MUTANTS = mutants()
LEAST = {"kernels/vispress_kernels/": 60, "src/vispress/runtime/": 40}
"""How many faults of each part there are at least."""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("code")
    copy_code(folder)
    return folder


def test_every_patch_applies(copy: Path) -> None:
    trouble = {one.name: found for one in MUTANTS if (found := one.apply(copy, check=True))}
    assert not trouble, f"write these anew for the code as it is: {trouble}"


@pytest.mark.parametrize("part", LEAST)
def test_there_are_enough(part: str) -> None:
    assert len([one for one in MUTANTS if one.target.startswith(part)]) >= LEAST[part]


@pytest.mark.slow
def test_every_patch_changes_one_file_and_names_a_test_that_exists() -> None:
    for one in MUTANTS:
        assert one.target.split("/")[0] in CODE, one.name
        path, _, name = one.killer.partition("::")
        assert (ROOT / path).is_file(), one.name
        assert Path(path).name.startswith("test_"), one.name
        tests = [node.name for node in ast.walk(ast.parse((ROOT / path).read_text()))
                 if isinstance(node, ast.FunctionDef)]  # fmt: skip
        assert not name or name.partition("[")[0] in tests, one.name
        assert one.what, one.name


def test_no_two_are_the_same() -> None:
    changes = {one.patch.read_text().partition("---")[2] for one in MUTANTS}
    assert len(changes) == len(MUTANTS)


def test_a_patch_of_other_code_is_noticed(copy: Path, tmp_path: Path) -> None:
    text = MUTANTS[0].patch.read_text()
    removed = next(x for x in text.splitlines() if x.startswith("-") and not x.startswith("---"))
    old = tmp_path / "old.patch"
    old.write_text(text.replace(removed, removed + " # as it was"))
    assert "does not apply" in read(old).apply(copy, check=True)


def test_a_mutant_changes_its_copy_alone(copy: Path, tmp_path: Path) -> None:
    one: Mutant = MUTANTS[0]
    shutil.copytree(copy, tmp_path / "again")
    assert not one.apply(tmp_path / "again")
    ours, changed = (root / one.target for root in (ROOT, tmp_path / "again"))
    assert ours.read_text() != changed.read_text()
    assert ours.read_text() == (copy / one.target).read_text()
