"""Results folders: whole files, one run at a time, nothing mixed, nothing lost."""

import errno
import json
import os
import subprocess
import sys

import pytest

from vispress.bench.results import store
from vispress.bench.results.store import ResultsError, open_results, read_results

IDENTITY = {"plan": "a", "commit": "c", "version": "1", "weights": "w"}
MANIFEST = {"plan": {"cells": [{"key": "one"}, {"key": "two"}]}}

HOLD = """
import sys, time
from pathlib import Path
from vispress.bench.results.store import open_results
with open_results(Path(sys.argv[1]), {"plan": "a"}, {}):
    print("held", flush=True)
    time.sleep(60)
"""


def opened(path, identity=IDENTITY, **options):
    return open_results(path, identity, MANIFEST, **options)


def test_cells_are_read_back_in_the_order_of_the_plan(tmp_path):
    with opened(tmp_path) as folder:
        folder.write("two", {"x": 2})
        folder.write("one", {"x": 1})
        assert folder.read("two")["x"] == 2
    assert [cell["x"] for cell in read_results(tmp_path)[1]] == [1, 2]


def test_a_failed_write_keeps_the_old_cell_and_says_why(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with opened(tmp_path) as folder:
        folder.write("one", {"x": 1})
        for step in ("fsync", "replace"):
            with monkeypatch.context() as patch:
                patch.setattr(store.os, step, full)
                with pytest.raises(ResultsError, match="No space left on device"):
                    folder.write("one", {"x": 2})
            assert folder.read("one")["x"] == 1
            assert [p.name for p in (tmp_path / "cells").iterdir()] == ["one.json"]


def test_half_written_files_count_as_missing(tmp_path):
    with opened(tmp_path) as folder:
        folder.write("one", {"x": 1})
    path = tmp_path / "cells" / "one.json"
    path.write_text(path.read_text()[:40])
    (tmp_path / "cells" / "two.json.1.tmp").write_text("{")
    with opened(tmp_path) as folder:
        assert folder.read("one") is None
        assert not list((tmp_path / "cells").glob("*.tmp"))


@pytest.mark.parametrize("name", ["plan", "commit", "weights"])
def test_foreign_folders_are_refused(tmp_path, name):
    with opened(tmp_path) as folder:
        folder.write("one", {"x": 1})
    other = IDENTITY | {name: "other"}
    with pytest.raises(ResultsError, match=f"another run: {name} .* \\(now other\\).*--force"):
        opened(tmp_path, other).__enter__()
    with opened(tmp_path) as folder:
        assert folder.read("one")["x"] == 1


def test_force_moves_foreign_results_aside(tmp_path):
    for number in range(3):
        identity = IDENTITY | {"plan": str(number)}
        with opened(tmp_path, identity, force=True) as folder:
            assert folder.read("one") is None
            folder.write("one", {"x": number})
    kept = [tmp_path / f"previous-{n}" / "cells" / "one.json" for n in (1, 2)]
    assert [json.loads(path.read_text())["x"] for path in kept] == [0, 1]


def test_force_keeps_results_of_the_same_run(tmp_path):
    with opened(tmp_path) as folder:
        folder.write("one", {"x": 1})
    with opened(tmp_path, force=True) as folder:
        assert folder.read("one")["x"] == 1


def test_two_runs_at_once_are_refused_and_a_killed_one_holds_nothing(tmp_path):
    run = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert run.stdout.readline() == b"held\n"
        with pytest.raises(ResultsError, match=f"another run holds .* \\(process {run.pid} on"):
            opened(tmp_path).__enter__()
    finally:
        run.kill()
        run.wait()
        run.stdout.close()
    with opened(tmp_path, {"plan": "a"}):
        pass


def test_two_runs_of_one_process_are_refused(tmp_path):
    with opened(tmp_path), pytest.raises(ResultsError, match="another run holds"):
        opened(tmp_path).__enter__()


def test_unwritable_folders_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match=r"cannot make the folder .*file/results: Not"):
        opened(tmp_path / "file" / "results").__enter__()


def test_read_only_folders_are_named(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(store.FileLock, "acquire", denied)
    with pytest.raises(ResultsError, match=r"cannot lock .*Permission denied"):
        opened(tmp_path).__enter__()


def test_folders_without_results_are_named(tmp_path):
    with pytest.raises(ResultsError, match="holds no results"):
        read_results(tmp_path)
