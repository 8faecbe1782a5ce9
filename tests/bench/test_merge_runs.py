"""Folders of several runs become one where they measured the same, and are refused where not."""

import json

import pytest
from tests.bench.stored import IDENTITY, write_results

from vispress.bench.results.merge_runs import merge_runs
from vispress.bench.results.store import ResultsError, open_results, read_results
from vispress.bench.results.summary import summarise

LATER = {"plan": "def", "commit": "ba9876543210"}


def change(folder, file, edit):
    """Edit a stored JSON file."""
    path = folder / file
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def as_later(folder):
    """Make the folder one of a later commit and another plan."""
    for path in [folder / "run.json", *(folder / "cells").glob("*.json")]:
        change(folder, path.relative_to(folder), lambda data: data["identity"].update(LATER))
    return folder


@pytest.fixture
def two(tmp_path):
    """An early run of fastv with its controls, and a later one of tome."""
    early, late = tmp_path / "early", tmp_path / "late"
    write_results(early, {"fastv": 0.8, "random": 0.5, "no_image": 0.1})
    write_results(late, {"tome": 0.7, "random": 0.5}, keep_ratios=(0.5, 0.125))
    return early, as_later(late)


def test_methods_of_two_runs_stand_in_one_table(two, tmp_path):
    out = tmp_path / "joined"
    # none and random--0.5
    assert merge_runs(two, out) == 2
    manifest, cells = read_results(out)
    keys = [cell["key"] for cell in cells]
    assert keys == [
        "none", "fastv--0.5", "fastv--0.25", "random--0.5", "random--0.25", "no_image",
        "tome--0.5", "tome--0.125", "random--0.125",
    ]  # fmt: skip
    assert manifest["plan"]["methods"] == ["fastv", "random", "no_image", "tome"]
    assert manifest["plan"]["keep_ratios"] == [0.5, 0.25, 0.125]
    assert manifest["identity"]["commit"] == f"{IDENTITY['commit']}, {LATER['commit']}"
    summary = summarise(out)
    assert summary.missing == 0
    for folder, group in zip(two, ("fastv", "tome"), strict=True):
        assert summary.find(group).accuracy == summarise(folder).find(group).accuracy


def test_cells_that_are_missing_stay_missing(two, tmp_path):
    (two[1] / "cells" / "tome--0.125.json").unlink()
    merge_runs(two, tmp_path / "joined")
    assert summarise(tmp_path / "joined").missing == 1


def test_no_run_goes_on_in_joined_results(two, tmp_path):
    out = tmp_path / "joined"
    merge_runs(two, out)
    merge_runs(two, out)
    for folder in two:
        manifest, _ = read_results(folder)
        with (
            pytest.raises(ResultsError, match="another run"),
            open_results(out, manifest["identity"], {}),
        ):
            pass


@pytest.mark.parametrize(
    ("name", "value"), [("questions", 21), ("seed", 1), ("dtype", "bf16"), ("model", "another")]
)
def test_other_questions_are_refused(two, tmp_path, name, value):
    change(two[1], "run.json", lambda data: data["plan"].update({name: value}))
    with pytest.raises(ResultsError, match=f"{name} is .* in one and {value} in the other"):
        merge_runs(two, tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


@pytest.mark.parametrize("name", ["weights", "version"])
def test_another_model_is_refused(two, tmp_path, name):
    for path in [two[1] / "run.json", *(two[1] / "cells").glob("*.json")]:
        change(two[1], path.relative_to(two[1]), lambda data: data["identity"].update({name: "x"}))
    with pytest.raises(ResultsError, match=f"{name} is"):
        merge_runs(two, tmp_path / "joined")


def _other_answer(cell):
    cell["tasks"]["needle"]["answers"][3] = "green"


def _other_method(cell):
    cell["cell"]["methods"] = [{"method": "random", "seed": 9}]


@pytest.mark.parametrize(
    ("edit", "what"), [(_other_answer, "answers"), (_other_method, "hyper-parameters")]
)
def test_a_shared_cell_that_differs_is_refused(two, tmp_path, edit, what):
    change(two[1], "cells/random--0.5.json", edit)
    with pytest.raises(ResultsError, match=rf"'random--0\.5' .* differs in its {what}"):
        merge_runs(two, tmp_path / "joined")


def test_runs_without_a_common_cell_are_refused(two, tmp_path):
    for key in ("none", "random--0.5"):
        (two[1] / "cells" / f"{key}.json").unlink()
    with pytest.raises(ResultsError, match="shares no finished cell"):
        merge_runs(two, tmp_path / "joined")


def test_what_cannot_be_joined_is_named(two, tmp_path):
    with pytest.raises(ResultsError, match="two folders or more, got 1"):
        merge_runs([two[0], two[0]], tmp_path / "joined")
    with pytest.raises(ResultsError, match="another --out"):
        merge_runs(two, two[0])
    with pytest.raises(ResultsError, match="holds no results"):
        merge_runs([two[0], tmp_path / "nothing"], tmp_path / "joined")
