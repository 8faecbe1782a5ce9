"""Folders of several runs become one where they measured the same, and are refused where not."""

import pytest
from tests.bench.stored import IDENTITY, change, restamp, write_results

from vispress.bench.results.files import ResultsError
from vispress.bench.results.merge_runs import merge_runs
from vispress.bench.results.opening import open_results
from vispress.bench.results.store import read_results
from vispress.bench.results.summary import summarise

LATER = {"commit": "ba9876543210"}


@pytest.fixture
def two(tmp_path):
    """An early run of fastv with its controls, and a later one of tome."""
    early, late = tmp_path / "early", tmp_path / "late"
    write_results(early, {"fastv": 0.8, "random": 0.5, "no_image": 0.1})
    write_results(late, {"tome": 0.7, "random": 0.5}, keep_ratios=(0.5, 0.125))
    return early, restamp(late, **LATER)


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
            open_results(out, manifest.pop("identity"), manifest),
        ):
            pass


@pytest.mark.parametrize(
    ("name", "value"), [("questions", 21), ("seed", 1), ("dtype", "bf16"), ("model", "another")]
)
def test_other_questions_are_refused(two, tmp_path, name, value):
    restamp(two[1], lambda manifest: manifest["plan"].update({name: value}))
    if name == "questions":
        for path in (two[1] / "cells").iterdir():
            path.unlink()
    with pytest.raises(ResultsError, match=f"{name} is .* in one and {value} in the other"):
        merge_runs(two, tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


@pytest.mark.parametrize("name", ["weights", "version"])
def test_another_model_is_refused(two, tmp_path, name):
    restamp(two[1], **{name: "x"})
    with pytest.raises(ResultsError, match=f"{name} is"):
        merge_runs(two, tmp_path / "joined")


def _other_answer(cell):
    cell["tasks"]["needle"]["answers"][3] = "green"


def _other_method(manifest):
    cell = next(one for one in manifest["plan"]["cells"] if one["key"] == "random--0.5")
    cell["methods"] = [{"method": "random", "seed": 9}]


@pytest.mark.parametrize("what", ["answers", "hyper-parameters"])
def test_a_shared_cell_that_differs_is_refused(two, tmp_path, what):
    if what == "answers":
        change(two[1] / "cells" / "random--0.5.json", _other_answer)
    else:
        restamp(two[1], _other_method)
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
