"""Results folders: whole files, one run at a time, nothing mixed, nothing lost."""

import errno
import json
import os
import subprocess
import sys

import pytest
from tests.bench.stored import change, restamp, write_results

from vispress.bench.plan.plan import Plan
from vispress.bench.results import files, locks
from vispress.bench.results.files import ResultsError
from vispress.bench.results.opening import open_results
from vispress.bench.results.store import MANIFEST, read_results

HOLD = """
import json, sys, time
from pathlib import Path
from vispress.bench.results.opening import open_results
manifest = json.loads(sys.argv[2])
with open_results(Path(sys.argv[1]), manifest.pop("identity"), manifest):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run's `run.json`, and its cells as the engine gives them to the store."""
    folder = write_results(tmp_path_factory.mktemp("made") / "r", {"good": 0.9}, questions=4)
    manifest, cells = read_results(folder)
    return manifest, {cell["key"]: without(cell, "key", "identity") for cell in cells}


def without(data, *names):
    return {name: value for name, value in data.items() if name not in names}


def opened(path, made, edit=lambda manifest: None, **options):
    """Open a folder for the run, or for another one."""
    manifest = json.loads(json.dumps(made[0]))
    edit(manifest)
    identity = manifest.pop("identity")
    return open_results(path, identity, manifest, **options)


def finish(path, made, *keys):
    with opened(path, made) as folder:
        for key in keys:
            folder.write(key, made[1][key])


def test_cells_are_read_back_in_the_order_of_the_plan(tmp_path, made):
    finish(tmp_path, made, "good--0.25", "none")
    with opened(tmp_path, made) as folder:
        assert without(folder.read("none"), "key", "identity") == made[1]["none"]
        assert folder.read("good--0.5") is None
    assert [cell["key"] for cell in read_results(tmp_path)[1]] == ["none", "good--0.25"]


def test_a_failed_write_keeps_the_old_cell_and_says_why(tmp_path, made, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with opened(tmp_path, made) as folder:
        folder.write("none", made[1]["none"])
        for step in ("fsync", "replace"):
            with monkeypatch.context() as patch:
                patch.setattr(files.os, step, full)
                with pytest.raises(ResultsError, match="No space left on device"):
                    folder.write("none", made[1]["none"] | {"notes": ["later"]})
            assert folder.read("none")["notes"] == []
            assert [p.name for p in (tmp_path / "cells").iterdir()] == ["none.json"]


def test_a_write_to_nowhere_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match=r"cannot write .*Not a directory"):
        files.write_text(tmp_path / "file" / "page.html", "text")


def test_half_written_files_count_as_missing(tmp_path, made):
    finish(tmp_path, made, "none")
    path = tmp_path / "cells" / "none.json"
    path.write_text(path.read_text()[:40])
    (tmp_path / "cells" / "good--0.5.json.1.tmp").write_text("{")
    (tmp_path / "mine.tmp").write_text("not of a run")
    with opened(tmp_path, made) as folder:
        assert folder.read("none") is None
        assert not list((tmp_path / "cells").glob("*.tmp"))
    assert (tmp_path / "mine.tmp").exists()


def test_a_cell_that_cannot_be_read_is_named_not_made_anew(tmp_path, made):
    finish(tmp_path, made)
    (tmp_path / "cells" / "none.json").mkdir()
    with opened(tmp_path, made) as folder, pytest.raises(ResultsError, match=r"cannot read .*none"):
        folder.read("none")


def test_what_could_not_be_read_again_is_not_written(tmp_path, made):
    bad = json.loads(json.dumps(made[1]["none"]))
    bad["tasks"]["needle"]["mean"] = float("nan")
    with opened(tmp_path, made) as folder:
        with pytest.raises(ResultsError, match=r"cell 'none' cannot be stored: tasks\.needle\.mea"):
            folder.write("none", bad)
        assert not list((tmp_path / "cells").iterdir())
    with pytest.raises(ResultsError, match=r"cannot be stored: tasks\.needle\.chance must be"):
        opened(
            tmp_path, made, lambda manifest: manifest["tasks"]["needle"].update(chance=2)
        ).__enter__()


def test_a_plan_as_it_is_made_can_be_stored(tmp_path, make_plan):
    plan: Plan = make_plan(
        keep_ratios=[0.5, 0.222], methods=["fastv"], controls="standard", positions="compact"
    )
    cards = {name: {"chance": 0.1, "needs": "tokens"} for name in plan.tasks}
    identity = {"plan": plan.digest(), "commit": None, "version": "1", "weights": "w"}
    manifest = {"plan": plan.to_dict(), "tasks": cards, "created": "2026-01-02T03:04:05+00:00"}
    with open_results(tmp_path, identity, manifest):
        pass
    assert read_results(tmp_path)[0]["identity"] == identity


@pytest.mark.parametrize("name", ["plan", "commit", "weights"])
def test_foreign_folders_are_refused(tmp_path, made, name):
    finish(tmp_path, made, "none")

    def other(manifest):
        if name == "plan":
            manifest["plan"]["seed"] = 5
            manifest["identity"]["plan"] = _digest(manifest["plan"])
        else:
            manifest["identity"][name] = "other"

    words = "another run: plan .* in place of" if name == "plan" else f"{name} .* in place of other"
    with pytest.raises(ResultsError, match=f"{words}.*--force"):
        opened(tmp_path, made, other).__enter__()
    with opened(tmp_path, made) as folder:
        assert folder.read("none") is not None


def _digest(plan):
    from vispress.bench.plan.provenance import digest

    return digest(plan)


def test_force_moves_foreign_results_aside(tmp_path, made):
    for number in range(3):

        def another(manifest, number=number):
            manifest["identity"]["weights"] = str(number)

        with opened(tmp_path, made, another, force=True) as folder:
            assert folder.read("none") is None
            folder.write("none", made[1]["none"])
    kept = [tmp_path / f"previous-{n}" / "cells" / "none.json" for n in (1, 2)]
    assert [json.loads(path.read_text())["identity"]["weights"] for path in kept] == ["0", "1"]


def test_force_keeps_results_of_the_same_run(tmp_path, made):
    finish(tmp_path, made, "none")
    with opened(tmp_path, made, force=True) as folder:
        assert folder.read("none") is not None


BROKEN = ["", "{", "[]", "{}", '{"identity": ', "[" * 100_000, '{"a": NaN}']


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_a_damaged_manifest_is_mended_by_its_own_run(tmp_path, made, text):
    finish(tmp_path, made, "none")
    before = (tmp_path / "cells" / "none.json").read_bytes()
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ResultsError, match=r"run\.json is damaged: .*the same command as before"):
        read_results(tmp_path)
    with opened(tmp_path, made) as folder:
        assert folder.read("none") is not None
    assert (tmp_path / "cells" / "none.json").read_bytes() == before
    assert read_results(tmp_path)[0] == made[0]


@pytest.mark.parametrize("text", [None, *BROKEN])
def test_a_damaged_manifest_does_not_let_another_run_write_over_its_cells(tmp_path, made, text):
    finish(tmp_path, made, "none")
    (tmp_path / MANIFEST).unlink() if text is None else (tmp_path / MANIFEST).write_text(text)

    def other(manifest):
        manifest["identity"]["weights"] = "other"

    before = (tmp_path / "cells" / "none.json").read_bytes()
    with pytest.raises(ResultsError, match=r"another run: weights .* in place of other.*--force"):
        opened(tmp_path, made, other).__enter__()
    assert (tmp_path / "cells" / "none.json").read_bytes() == before
    with opened(tmp_path, made, other, force=True) as folder:
        assert folder.read("none") is None
    assert (tmp_path / "previous-1" / "cells" / "none.json").read_bytes() == before


def test_a_file_of_that_name_that_is_of_no_run_is_not_written_over(tmp_path, made):
    (tmp_path / MANIFEST).write_text('{"runs": 3}')
    with pytest.raises(ResultsError, match=r"run\.json is damaged: identity is missing.*--force"):
        opened(tmp_path, made).__enter__()
    assert (tmp_path / MANIFEST).read_text() == '{"runs": 3}'


def test_what_the_tasks_are_said_to_be_is_brought_up_to_date(tmp_path, made):
    finish(tmp_path, made, "none")

    def older(manifest):
        manifest["tasks"]["needle"]["needs"] = "what another commit said"
        manifest["created"] = "2025-12-31T00:00:00"

    change(tmp_path / MANIFEST, older)
    with opened(tmp_path, made):
        pass
    manifest, _ = read_results(tmp_path)
    assert manifest["tasks"] == made[0]["tasks"]
    assert manifest["created"] == "2025-12-31T00:00:00"


@pytest.mark.slow
def test_two_runs_at_once_are_refused_and_a_killed_one_holds_nothing(tmp_path, made):
    arguments = [sys.executable, "-c", HOLD, str(tmp_path), json.dumps(made[0])]
    run = subprocess.Popen(arguments, stdout=subprocess.PIPE)
    try:
        assert run.stdout.readline() == b"held\n"
        with pytest.raises(ResultsError, match=f"another run holds .* \\(process {run.pid} on"):
            opened(tmp_path, made).__enter__()
    finally:
        run.kill()
        run.wait()
        run.stdout.close()
    with opened(tmp_path, made):
        pass


def test_two_runs_of_one_process_are_refused(tmp_path, made):
    with opened(tmp_path, made), pytest.raises(ResultsError, match="another run holds"):
        opened(tmp_path, made).__enter__()


def test_unwritable_folders_are_named(tmp_path, made):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match=r"cannot make the folder .*file/results: Not"):
        opened(tmp_path / "file" / "results", made).__enter__()


def test_read_only_folders_are_named(tmp_path, made, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(locks.FileLock, "acquire", denied)
    with pytest.raises(ResultsError, match=r"cannot lock .*Permission denied"):
        opened(tmp_path, made).__enter__()


def test_folders_without_results_are_named(tmp_path):
    with pytest.raises(ResultsError, match="holds no results"):
        read_results(tmp_path)


def test_cells_that_contradict_each_other_are_named(tmp_path):
    folder = write_results(tmp_path / "r", {"good": 0.9}, questions=4)
    change(folder / "cells" / "good--0.5.json", lambda cell: cell.pop("cost"))
    with pytest.raises(ResultsError, match="cost is measured in cell 'none' and not measured in"):
        read_results(folder)
    restamp(folder, lambda manifest: manifest["plan"]["timing"].update(batch=3))
    with pytest.raises(ResultsError, match=r"none\.json is damaged: cost\.batch is 4, the plan's"):
        read_results(folder)


@pytest.mark.parametrize("file", [MANIFEST, "cells/good--0.5.json"])
def test_tasks_in_another_order_are_refused(tmp_path, file):
    """Strata of intervals and tests go by it."""
    folder = write_results(tmp_path / "r", {"good": 0.9}, questions=4)
    change(
        folder / file, lambda data: data["tasks"].update(attribute=data["tasks"].pop("attribute"))
    )
    with pytest.raises(ResultsError, match=r"tasks (are|describes) \['needle', 'attribute'\]"):
        read_results(folder)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (json.loads('{"a":' * 200 + "1" + "}" * 200), "nested deeper than 32 levels"),
        ({"word": "\ud800"}, r"plan\.overrides\.good\.word must be text in Unicode"),
        ({"\ud800": 1}, r"a name in plan\.overrides\.good must be text in Unicode"),
        ({"much": 10**30}, r"plan\.overrides\.good\.much must be a whole number of 64 bits"),
    ],
)
def test_what_a_plan_says_freely_is_plain_data(tmp_path, value, words):
    """Also where no hash tells: of folders that were joined before joining stored identities."""
    folder = write_results(tmp_path / "r", {"good": 0.9}, questions=4)
    restamp(folder, commit="0123456789ab, ba9876543210")
    for path in (folder / "cells").iterdir():
        change(path, lambda cell: cell["provenance"].update(commit="ba9876543210"))
    read_results(folder)
    change(folder / MANIFEST, lambda manifest: manifest["plan"]["overrides"].update(good=value))
    with pytest.raises(ResultsError, match=words):
        read_results(folder)
