"""Running plans: what is stored, and that a kill loses nothing and repeats nothing."""

import csv
import io
import json
import signal
import subprocess
import sys
import time

import pytest
import yaml

from vispress.bench.results.files import ResultsError
from vispress.bench.results.plots import write_plots
from vispress.bench.results.summary import summarise, write_summary
from vispress.bench.results.table import tables
from vispress.bench.run import engine
from vispress.bench.run.engine import run
from vispress.bench.tasks.task import get_task
from vispress.bench.timing.cost import timed_batch
from vispress.errors import BudgetError

KEYS = ["none", "fastv--0.5", "random--0.5--seed0", "random--0.5--seed1", "no_image"]

RUN = """
import sys
from vispress.bench.run.engine import run
from vispress.bench.plan.plan import load_plan
run(load_plan(sys.argv[1]), sys.argv[2])
"""

RUN_AND_DIE = """
import os, signal, sys
from vispress.bench.results import files
from vispress.bench.run.engine import run
from vispress.bench.plan.plan import load_plan
step, left = sys.argv[3], int(sys.argv[4])
def dying(call):
    def wrapper(*arguments):
        global left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments)
    return wrapper
advance = lambda *_: None
if step == "advance":
    advance = dying(advance)
else:
    setattr(files.os, step, dying(getattr(os, step)))
run(load_plan(sys.argv[1]), sys.argv[2], advance=advance)
"""


class Killed(BaseException):
    """Stands for a signal."""


def stored(out):
    return {path.stem: path for path in (out / "cells").glob("*.json")}


def results(out):
    """What the cells say, without times and provenance."""
    return {
        key: (data.get("refused"), data.get("tasks"), data.get("kept"))
        for key, data in ((k, json.loads(p.read_text())) for k, p in stored(out).items())
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory, checkpoint):
    """A finished run with timing."""
    from vispress.bench.plan.plan import plan_from_mapping

    plan = plan_from_mapping(
        {
            "model": str(checkpoint),
            "tasks": ["attribute", "count"],
            "methods": ["fastv", {"method": "random", "seeds": [0, 1]}, "no_image"],
            "keep_ratios": [0.5],
            "questions": 4,
            "max_new_tokens": 2,
            "timing": {"batch": 2, "rounds": 2, "repeats": 1},
            "controls": "none",
        }
    )
    out = tmp_path_factory.mktemp("finished")
    run(plan, out)
    return plan, out


@pytest.mark.slow
def test_every_cell_is_stored_with_where_it_comes_from(finished):
    plan, out = finished
    assert sorted(stored(out)) == sorted(KEYS)
    data = json.loads(stored(out)["fastv--0.5"].read_text())
    assert data["cell"]["methods"] == [{"method": "fastv", "mean_keep_ratio": 0.5}]
    assert len(data["tasks"]["count"]["right"]) == len(data["tasks"]["count"]["answers"]) == 4
    assert data["kept"]["kept_mean_over_layers"] == 72
    assert data["kept"]["kept_at_end"] == 48  # (4 * 72 - 144) / 3
    assert data["identity"]["plan"] == plan.digest()
    assert data["seed"] == plan.seed
    assert {"commit", "versions", "device", "dtype", "attention"} <= set(data["provenance"])
    assert any("scaled to 4 layers" in note for note in data["notes"])


@pytest.mark.slow
def test_uncompressed_and_blind_cells_say_what_they_are(finished):
    cells = {key: json.loads(path.read_text()) for key, path in stored(finished[1]).items()}
    assert cells["none"]["kept"]["ratio_at_end"] == 1.0
    assert cells["no_image"]["kept"]["kept_at_end"] == 0
    none, fastv, blind = (cells[key]["cost"] for key in ("none", "fastv--0.5", "no_image"))
    assert none["kv_bytes"] == none["uncompressed_kv_bytes"] == fastv["uncompressed_kv_bytes"]
    # keys and values, 4 layers, width 192, fp32
    text = none["prompt_tokens"] - 144
    assert none["kv_bytes"] == 2 * 4 * 192 * 4 * (text + 144)
    assert fastv["kv_bytes"] == 2 * 4 * 192 * 4 * (text + 72)
    assert blind["kv_bytes"] == 2 * 4 * 192 * 4 * text
    ratio = fastv["prefill_ratio"]
    assert 0 < ratio["p20"] <= ratio["median"] <= ratio["p80"]


@pytest.mark.slow
def test_a_finished_run_is_not_repeated(finished, monkeypatch):
    plan, out = finished
    before = {key: path.stat().st_mtime_ns for key, path in stored(out).items()}
    monkeypatch.setattr(engine, "run_cell", None)
    counted = []
    run(plan, out, advance=lambda _, number: counted.append(number))
    assert {key: path.stat().st_mtime_ns for key, path in stored(out).items()} == before
    assert sum(counted) == len(KEYS) * 2 * 4


@pytest.mark.slow
def test_another_plan_is_refused_on_the_same_folder(finished, make_plan):
    with pytest.raises(ResultsError, match="results of another run: plan"):
        run(make_plan(seed=5), finished[1])


@pytest.mark.slow(cases=2)
@pytest.mark.parametrize("point", [0, 1, 2, 4, 6, 9])
def test_stopping_anywhere_loses_nothing_and_repeats_nothing(
    finished, make_plan, tmp_path, monkeypatch, point
):
    plan, calls = make_plan(), []

    def stop(what, _):
        calls.append(what)
        if len(calls) > point:
            raise Killed

    with pytest.raises(Killed):
        run(plan, tmp_path, advance=stop)
    done = {key: path.stat().st_mtime_ns for key, path in stored(tmp_path).items()}
    again = []
    original = engine.run_cell
    monkeypatch.setattr(engine, "run_cell", lambda *a: (again.append(a[1].key), original(*a))[1])
    run(plan, tmp_path)
    assert again == [key for key in KEYS if key not in done]
    assert done.items() <= {k: p.stat().st_mtime_ns for k, p in stored(tmp_path).items()}.items()
    assert results(tmp_path) == results(finished[1])


@pytest.mark.full
def test_a_killed_process_is_resumed(finished, make_plan, tmp_path):
    plan = make_plan()
    small = {
        "model": plan.model,
        "tasks": list(plan.tasks),
        "methods": [*plan.methods],
        "keep_ratios": [0.5],
        "questions": 4,
        "max_new_tokens": 2,
        "timing": {"batch": 0},
        "controls": "none",
    }
    (file := tmp_path / "plan.yaml").write_text(yaml.safe_dump(small))
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", RUN, str(file), str(out)])
    try:
        end = time.monotonic() + 120
        while len(stored(out)) < 2:
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    done = {key: path.stat().st_mtime_ns for key, path in stored(out).items()}
    run(plan, out)
    assert done.items() <= {k: p.stat().st_mtime_ns for k, p in stored(out).items()}.items()
    assert results(out) == results(finished[1])


# what is called when the kill comes: locks and owner, manifest, in a cell, in its write, behind it
KILLS = [("fsync", 1), ("replace", 2), ("fsync", 3), ("replace", 4), ("advance", 5)]


@pytest.mark.slow
@pytest.mark.parametrize(("step", "number"), KILLS)
def test_a_kill_at_any_step_loses_nothing_and_repeats_nothing(
    finished, make_plan, tmp_path, monkeypatch, step, number
):
    plan = make_plan()
    small = {name: getattr(plan, name) for name in ("model", "questions", "max_new_tokens")}
    small |= {"tasks": list(plan.tasks), "methods": [*plan.methods], "keep_ratios": [0.5]}
    (file := tmp_path / "plan.yaml").write_text(
        yaml.safe_dump(small | {"timing": {"batch": 0}, "controls": "none"})
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", RUN_AND_DIE, str(file), str(out), step, str(number)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    done = {key: path.stat().st_mtime_ns for key, path in stored(out).items()}
    again = []
    original = engine.run_cell
    monkeypatch.setattr(engine, "run_cell", lambda *a: (again.append(a[1].key), original(*a))[1])
    run(plan, out)
    assert again == [key for key in KEYS if key not in done]
    assert done.items() <= {k: p.stat().st_mtime_ns for k, p in stored(out).items()}.items()
    assert results(out) == results(finished[1])
    assert not list(out.rglob("*.tmp"))


def test_a_budget_that_cannot_be_met_is_a_refused_cell_with_its_reason(make_plan, tmp_path):
    plan = make_plan(methods=["fastv"], keep_ratios=[0.2], tasks=["count"])
    run(plan, tmp_path)
    row = summarise(tmp_path).rows[1]
    assert row.accuracy is None
    assert "mean_keep_ratio=0.2 cannot be reached" in row.refused


def test_an_off_target_run_is_an_error_and_leaves_no_cell(make_plan, tmp_path, monkeypatch):
    monkeypatch.setattr("vispress.bench.run.budget_check.expected_counts", lambda *_, **__: [71])
    with pytest.raises(BudgetError, match="off target"):
        run(make_plan(), tmp_path)
    assert list(stored(tmp_path)) == ["none"]


def test_answers_in_batches_are_those_alone(subject):
    prompts = get_task("relation").draw(3, 0) + get_task("attribute").draw(2, 0)
    together = subject.answer(prompts, 2)
    assert together == [subject.answer([prompt], 2)[0] for prompt in prompts]


def test_timed_batches_have_no_padding(subject):
    prompts = get_task("relation").draw(3, 0) + get_task("attribute").draw(4, 0)
    batch = timed_batch(subject, prompts, 2)
    assert bool(subject.encode(batch)["attention_mask"].all())


@pytest.mark.slow
def test_tables_show_chance_blind_and_seeds(finished):
    from rich.console import Console

    console = Console(width=140, record=True, file=io.StringIO())
    console.print(tables(summarise(finished[1])))
    text = console.export_text()
    for words in ("uncompressed", "best constant answer", "no_image (blind)", "random (2 seeds)"):
        assert words in text
    assert "cost: milliseconds of a batch of 2" in text
    assert "48.0 of 144" in text


@pytest.mark.slow
def test_summaries_and_plots_are_written(finished, tmp_path):
    summary = summarise(finished[1])
    write_summary(summary, tmp_path)
    files = write_plots(summary, tmp_path)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)
    lines = (tmp_path / "summary.csv").read_text().splitlines()
    assert len(lines) == 1 + 4 * 3  # rows x (tasks and their mean)
    rows = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert [row["group"] for row in rows] == ["none", "fastv", "random", "no_image"]
    assert rows[1]["cost"]["flops_ratio"]["mac3"] < rows[0]["cost"]["flops_ratio"]["mac3"] == 1.0
    written = list(csv.DictReader(lines))
    assert [line["overhead_ms"] != "" for line in written] == [False] * 3 + [True] * 9
    assert all(float(line["ttft_ms"]) > float(line["prefill_ms"]) > 0 for line in written)
    assert not list(tmp_path.glob("*.tmp"))
