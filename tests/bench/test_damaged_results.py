"""A results folder with one damage: a named error or a cell made anew, never a traceback.

Every value of a `run.json` and of a cell is taken away, doubled, misspelt, and replaced by values
of each wrong type and by numbers that contradict the others. What is accepted all the same is
listed: it is stored once and derives from nothing, so nothing can contradict it.
"""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.bench.stored import change, restamp, write_results

from vispress.bench.page.gallery import gallery
from vispress.bench.page.render import page
from vispress.bench.page.results import read as read_page
from vispress.bench.results import files
from vispress.bench.results.csv_rows import csv_text
from vispress.bench.results.files import ResultsError
from vispress.bench.results.merge_runs import merge_runs
from vispress.bench.results.opening import open_results
from vispress.bench.results.store import MANIFEST, ResultsFolder, read_results
from vispress.bench.results.summary import summarise
from vispress.bench.results.table import tables

DEEP = "nested so deep that only its text can be written"
VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "text": "text",
    "no text": "",
    "half a letter": "\ud800",
    "a path": "../../other",
    "minus one": -1,
    "zero": 0,
    "a half": 0.5,
    "huge": 10**30,
    "long": 10**4000,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "a list": [],
    "a mapping of others": {"a": 0},
    "nested": json.loads("[" * 100 + "]" * 100),
    "deep": DEEP,
}

CELL, REFUSED = "cells/good--0.5.json", "cells/good--0.25.json"
PLACE = r"provenance\.(device|dtype|attention|versions(\.\w+)?)"
FREE = {
    MANIFEST: (r"tasks\.\w+\.(chance|needs)",),
    CELL: (
        r"tasks\.\w+\.(answers\[\d\]|turns\[\d\]|low|high)",
        r"notes(\[\d\])?",
        r"kept\.images",
        r"cost\.\w+_(ms|ratio|share)\.(p20|median|p80)",
        r"cost\.(uncompressed_)?(kv|peak)_bytes",
        PLACE,
    ),
    REFUSED: ("refused", PLACE),
}
"""Places whose value may be another one of the right type: nothing else says what it was."""


def damages(data: Any) -> Iterator[tuple[str, str]]:
    """Make every single damage in place, in turns; its place and name."""
    for where, parent, key in nodes(data, ""):
        old = parent[key]
        changed = {n: v for n, v in VALUES.items() if (type(v), v) != (type(old), old)}
        if isinstance(old, int | float) and not isinstance(old, bool):
            changed["a little more"] = 1.01 * old + 0.01
        if isinstance(old, str) and old and set(old) <= {"0", "1"}:
            changed["another mark"] = "10"[int(old[0])] + old[1:]
        for name, value in changed.items():
            parent[key] = value
            yield where, name
        if isinstance(parent, dict):
            whole = dict(parent)
            for name, spelt in (("missing", {}), ("misspelt", {f"{key}x": old})):
                parent.clear()
                parent |= {k: v for k, v in whole.items() if k != key} | spelt
                yield where, name
            parent.clear()
            parent |= whole
        else:
            whole = list(parent)
            for name, few in (("missing", []), ("twice", [old, old])):
                parent[key : key + 1] = few
                yield where, name
                parent[:] = whole
        parent[key] = old


def nodes(data: Any, place: str) -> list[tuple[str, Any, Any]]:
    """Values, of a list the first: their place, what holds them, and under which name."""
    found = []
    for key in list(data) if isinstance(data, dict) else range(min(1, len(data))):
        inner = f"{place}[{key}]" if isinstance(key, int) else f"{place}.{key}".lstrip(".")
        found.append((inner, data, key))
        if isinstance(data[key], dict | list):
            found += nodes(data[key], inner)
    return found


def written(data: Any) -> str:
    """Its text, as a careless program or a hand would write it."""
    return json.dumps(data).replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000)


def make_folder(path):
    """Two answered cells and a refused one, with everything that a run can store."""
    folder = write_results(
        path, {"good": 0.9}, keep_ratios=(0.5, 0.25), questions=4, refused=["good--0.25"]
    )

    def plan(manifest):
        manifest["plan"]["methods"] = [{"method": "good", "layers": [1, 2]}]
        manifest["plan"]["overrides"] = {"good": {"layers": [1, 2]}}
        manifest["plan"]["sources"] = {"needle": {"dataset": "set", "columns": ["a"]}}
        manifest["plan"]["cells"][1]["methods"] = [{"method": "good", "layers": [1, 2]}]

    def answers(cell):
        if "refused" in cell:
            return
        cell["notes"] = ["a note"]
        cell["tasks"]["needle"]["turns"] = [cell["tasks"]["needle"]["right"], "101"]
        scores = [0.75 if mark == "1" else 0.25 for mark in cell["tasks"]["attribute"]["right"]]
        cell["tasks"]["attribute"] |= {"scores": scores, "mean": sum(scores) / 4}

    restamp(folder, plan)
    for cell in (folder / "cells").iterdir():
        change(cell, answers)
    return folder


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """For a file, once: what damages were accepted, and how many were refused."""
    found = {}

    def trying(name):
        if name not in found:
            folder = make_folder(tmp_path_factory.mktemp("damaged") / "r")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(files.os, "fsync", lambda _: None)
                found[name] = _accepted(folder, name)
        return found[name]

    return trying


def _accepted(folder, name):
    manifest, _ = read_results(folder)
    data, accepted, refused = json.loads((folder / name).read_text()), {}, 0
    others = {p: p.read_bytes() for p in (folder / "cells").iterdir() if p != folder / name}
    for damage in damages(data):
        text = written(data)
        (folder / name).write_text(text)
        error = caught(read_results, folder)
        if error is None:
            accepted[damage] = text
        else:
            assert Path(name).name in str(error) or "two cells" in str(error), damage
            assert len(str(error)) < 1000, damage
            refused += 1
        if name == MANIFEST:
            _reopen(folder, manifest, damage)
            assert others == {path: path.read_bytes() for path in others}, damage
        else:
            # a run has it made anew, or goes on with it: that cells differ is seen at its end
            again = ResultsFolder(folder, manifest).read(Path(name).stem)
            assert again is None or again["identity"] == manifest["identity"], damage
    return accepted, refused


def caught(call, *arguments):
    """The named error of a call, or None."""
    try:
        call(*arguments)
    except ResultsError as error:
        return error
    return None


def _reopen(folder, manifest, damage):
    """The run goes on, with `run.json` as it was; or it is told that the folder is another's."""

    def go_on():
        rest = {key: value for key, value in manifest.items() if key != "identity"}
        with open_results(folder, manifest["identity"], rest) as opened:
            assert opened.read("good--0.5") is not None

    error = caught(go_on)
    if error is not None:
        assert "--force" in str(error), damage
    else:
        assert json.loads((folder / MANIFEST).read_text()) == manifest, damage


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("name", FREE)
def test_only_what_nothing_contradicts_is_accepted(tried, name):
    accepted, refused = tried(name)
    free = re.compile("|".join(FREE[name]))
    assert [damage for damage in accepted if not free.fullmatch(damage[0])] == []
    assert refused > 400


@pytest.mark.slow
@pytest.mark.parametrize("name", [MANIFEST, pytest.param(CELL, marks=pytest.mark.full), REFUSED])
def test_what_is_accepted_is_shown_without_a_traceback(tried, name, tmp_path):
    folder = make_folder(tmp_path / "r")
    # what is measured four times, of two models, is shown in the same way
    alike = re.compile(r"(uncompressed_)?(encoder|prefill|ttft|decode)_")
    kinds = {(alike.sub("", place), what): text for (place, what), text in tried(name)[0].items()}
    assert kinds
    for text in kinds.values():
        (folder / name).write_text(text)
        summary = summarise(folder)
        csv_text(summary)
        Console(file=io.StringIO(), width=160).print(tables(summary))
        results = read_page(folder)
        page(results, gallery(results, number=1))


def test_damaged_folders_are_not_joined(tmp_path):
    folders = [make_folder(tmp_path / name) for name in ("one", "two")]
    change(folders[1] / CELL, lambda cell: cell["tasks"]["needle"].update(mean=0.99))
    with pytest.raises(ResultsError, match=r"two/cells/good--0\.5\.json is damaged: tasks\.n"):
        merge_runs(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()
