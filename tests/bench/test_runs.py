"""Whole runs: controls beside methods, conversations, what cells share, and what can go wrong."""

import errno
import json
import os
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from tests.bench.test_engine import results, stored

from vispress.bench.model.batches import Memory, make_batches
from vispress.bench.model.loaded_model import LoadedModel
from vispress.bench.results import files
from vispress.bench.results.files import ResultsError
from vispress.bench.results.summary import summarise, write_summary
from vispress.bench.results.table import tables
from vispress.bench.run import engine
from vispress.bench.run.engine import Bank, run, run_cell
from vispress.bench.tasks import task as tasks
from vispress.bench.tasks.task import Prompt, Task, get_task
from vispress.errors import ConfigError, UnsupportedModelError, VispressError


@pytest.fixture(scope="module")
def beside_controls(tmp_path_factory, checkpoint):
    """A finished run of one method and the standard controls."""
    from vispress.bench.plan.plan import plan_from_mapping

    plan = plan_from_mapping(
        {
            "model": str(checkpoint),
            "tasks": ["attribute", "count"],
            "methods": ["divprune"],
            "keep_ratios": [0.222],
            "questions": 4,
            "max_new_tokens": 2,
            "timing": {"batch": 0},
        }
    )
    out = tmp_path_factory.mktemp("controls")
    run(plan, out)
    return plan, out


@pytest.mark.slow
def test_controls_stand_beside_every_method(beside_controls):
    out = beside_controls[1]
    cells = {key: json.loads(path.read_text()) for key, path in stored(out).items()}
    assert set(cells) == {
        "none",
        "divprune--0.222",
        *(f"random--0.222--seed{seed}" for seed in range(3)),
        "uniform--0.222",
        "avg_pool--0.222",
        "downsample--0.222",
        "oracle--0.222",
        "no_image",
        "vtw",
    }
    assert not any("refused" in cell for cell in cells.values())
    kept = {key: cell["kept"]["kept_mean_over_layers"] for key, cell in cells.items()}
    assert kept["oracle--0.222"] == kept["divprune--0.222"] == 32
    assert kept["downsample--0.222"] == 30  # 5 x 6
    assert cells["downsample--0.222"]["kept"]["visual_tokens"] == 144
    assert kept["vtw"] == 72
    assert cells["oracle--0.222"]["cell"]["methods"] == [
        {"method": "oracle", "mean_keep_ratio": 0.222}
    ]
    assert cells["downsample--0.222"]["cell"]["methods"] == [
        {"method": "downsample", "keep_ratio": 0.222}
    ]
    controls = {cell["cell"]["group"] for cell in cells.values() if cell["cell"]["control"]}
    assert controls == {
        "random", "uniform", "avg_pool", "downsample", "oracle", "no_image", "vtw"
    }  # fmt: skip


def test_rows_are_measured_against_the_controls(beside_controls, tmp_path):
    summary = summarise(beside_controls[1])
    rows = {row.group: row for row in summary.rows}
    method, whole = rows["divprune"], rows["none"]
    assert rows["downsample"].hard is None or rows["downsample"].hard.mean == 0.0
    assert {row.hard_questions for row in summary.rows if row.keep_ratio} == {method.hard_questions}
    assert whole.gap_closed is whole.hard is None
    assert rows["no_image"].mean_gain.mean == 0.0
    assert method.mean_gain.mean == pytest.approx(
        method.accuracy.mean - rows["no_image"].accuracy.mean
    )
    assert set(method.gain) == set(summary.leakage) == {"attribute", "count"}
    assert rows["oracle"].control
    assert not method.control
    assert {c.control for c in summary.comparisons} <= {
        "random",
        "uniform",
        "avg_pool",
        "downsample",
    }
    write_summary(summary, tmp_path)
    header = (tmp_path / "summary.csv").read_text().splitlines()[0].split(",")
    assert {"gap_closed", "hard", "hard_questions", "gain", "leakage", "turns"} <= set(header)
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["rankings"][0]["places"]
    console = Console(width=160, record=True)
    console.print(tables(summary))
    text = " ".join(console.export_text().split())
    for words in ("closed", "hard", "leakage: blind beyond it", "ranking at 0.222"):
        assert words in text


def talk(n, _seed):
    prompts = get_task("attribute").draw(n, 0)
    later = (("how many red shapes ? :", "zero"), ("which digit is red ? :", "1"))
    return [Prompt(p.images, p.text, p.answer, p.evidence, later) for p in prompts]


def test_a_conversation_is_right_when_all_turns_are(make_plan, tmp_path, monkeypatch):
    drawn = talk(3, 0)
    task = Task("talk", "a shape", 0.1, lambda *_: drawn)
    monkeypatch.setitem(tasks._TASKS, "talk", task)
    later = [("zero", "1"), ("one", "1"), ("zero", "1")]

    def converse(self, prompts, inputs, _):
        """All first turns but the last one's are right, all second but the second's."""
        places = [next(i for i, own in enumerate(drawn) if own is prompt) for prompt in prompts]
        return [
            ("nothing" if place == 2 else drawn[place].answer, *later[place]) for place in places
        ]

    monkeypatch.setattr(LoadedModel, "converse", converse)
    run(make_plan(tasks=["talk"], methods=[], questions=3), tmp_path)
    data = json.loads(stored(tmp_path)["none"].read_text())["tasks"]["talk"]
    assert data["right"] == "100"
    assert data["turns"] == ["110", "101", "111"]
    assert data["answers"][1].endswith(" / one / 1")
    (row,) = summarise(tmp_path).rows
    assert [turn.mean for turn in row.turns["talk"]] == pytest.approx([2 / 3, 2 / 3, 1.0])


def test_conversations_are_compressed_and_told_their_evidence(make_plan, tmp_path, monkeypatch):
    monkeypatch.setitem(tasks._TASKS, "talk", Task("talk", "a shape", 0.1, talk))
    plan = make_plan(tasks=["talk"], methods=["fastv", "oracle", "downsample"])
    run(plan, tmp_path)
    cells = {key: json.loads(path.read_text()) for key, path in stored(tmp_path).items()}
    assert {key: cell["kept"]["kept_mean_over_layers"] for key, cell in cells.items()} == {
        "none": 144,
        "fastv--0.5": 72,
        "oracle--0.5": 72,
        "downsample--0.5": 72,  # 8 x 9
    }
    assert all(len(cell["tasks"]["talk"]["turns"]) == 3 for cell in cells.values())


@pytest.mark.slow
def test_what_cells_share_changes_no_answer(subject, make_plan):
    methods = ["fastv", "visionzip", "zoo_prune", "prumerge", "downsample", "oracle"]
    plan = make_plan(methods=methods, batch_size=3)
    shared = Bank.of(plan, subject, {name: get_task(name).draw(4, 0) for name in plan.tasks})
    alone = replace(shared, memory=Memory(subject, limit=0))
    encoded = []
    tower = subject.model.model.vision_tower
    handle = tower.register_forward_hook(lambda *_: encoded.append(1))
    try:
        for cell in plan.cells():
            encoded.clear()
            got = run_cell(plan, cell, subject, shared, lambda *_: None)
            # two batches a task; three methods read the encoder, smaller pictures change it
            inside = cell.group in ("none", "visionzip", "zoo_prune", "prumerge", "downsample")
            assert len(encoded) == (4 if inside else 0), cell.key
            again = replace(cell, keep_ratio=0.25)  # asks the encoder for the same
            run_cell(plan, again, subject, shared, lambda *_: None)
            runs = 8 if cell.group == "downsample" else 4 if inside else 0
            assert len(encoded) == runs, cell.key
            encoded.clear()
            assert run_cell(plan, cell, subject, alone, lambda *_: None) == got
            assert len(encoded) == 4, cell.key
    finally:
        handle.remove()
    assert "get_image_features" not in subject.model.model.__dict__


def test_batches_beyond_the_limit_are_made_again(subject):
    prompts = get_task("count").draw(4, 0)
    made = make_batches(subject, "count", prompts, 2)
    size = 2 * 3 * 96 * 96 * 4
    memory = Memory(subject, limit=2 * size)
    first, second = (memory.inputs(batch) for batch in made)
    assert memory.inputs(made[0]) is first
    assert memory.inputs(made[1]) is not second
    assert torch.equal(memory.inputs(made[1])["pixel_values"], second["pixel_values"])


def test_questions_without_evidence_leave_the_oracle_out(make_plan, tmp_path, monkeypatch):
    def draw(n, seed):
        return [replace(prompt, evidence=()) for prompt in get_task("count").draw(n, seed)]

    monkeypatch.setitem(tasks._TASKS, "plain", Task("plain", "unknown", 0.1, draw))
    run(make_plan(tasks=["plain"], methods=["oracle", "divprune"]), tmp_path)
    rows = {row.group: row for row in summarise(tmp_path).rows}
    assert "does not say" in rows["oracle"].refused
    assert rows["divprune"].accuracy is not None
    assert rows["divprune"].gap_closed is None


@pytest.mark.slow
def test_methods_of_all_that_do_not_fit_are_listed_with_the_reason(make_plan, tmp_path):
    plan = make_plan(tasks=["count"], methods="all", keep_ratios=[0.2], questions=1)
    explicit = make_plan(methods=[{"method": "pyramiddrop", "layers": [1, 2, 9]}])
    with pytest.raises(ConfigError, match="layers"):
        run(explicit, tmp_path / "explicit")
    assert not stored(tmp_path / "explicit")
    overrides = {"pyramiddrop": {"layers": [1, 2, 9]}}
    run(replace(plan, overrides=overrides), tmp_path / "all")
    rows = {row.group: row for row in summarise(tmp_path / "all").rows}
    assert "layers" in rows["pyramiddrop"].refused
    assert "cannot be reached" in rows["fastv"].refused
    assert rows["divprune"].accuracy is not None


@pytest.mark.slow
def test_a_full_disk_loses_nothing(make_plan, tmp_path, monkeypatch):
    plan = make_plan()
    synced = []

    def full(descriptor):
        synced.append(descriptor)
        if len(synced) > 4:  # owner, manifest and two cells
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(ResultsError, match=r"No space left on device.*Finished cells are safe"):
            run(plan, tmp_path)
    assert sorted(stored(tmp_path)) == ["fastv--0.5", "none"]
    assert not list(tmp_path.rglob("*.tmp"))
    again = []
    original = engine.run_cell
    monkeypatch.setattr(engine, "run_cell", lambda *a: (again.append(a[1].key), original(*a))[1])
    run(plan, tmp_path)
    assert again == ["random--0.5--seed0", "random--0.5--seed1", "no_image"]
    assert set(results(tmp_path)) == {"none", "fastv--0.5", *again}


def test_a_disk_that_is_full_from_the_start_is_named(make_plan, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.Path, "mkdir", full)
    with pytest.raises(ResultsError, match=r"cannot make the folder .*No space left"):
        run(make_plan(), tmp_path / "new")


def test_a_model_that_no_adapter_knows_is_refused_before_anything_is_written(
    make_plan, tmp_path, monkeypatch
):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 9}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(config)
    monkeypatch.setattr(
        engine, "load_named_model", lambda *_: LoadedModel("text", model, None, "none")
    )
    with pytest.raises(UnsupportedModelError, match=r"no adapter for LlamaForCausalLM.*llava"):
        run(make_plan(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [{"tasks": ["atribute"]}, {"methods": ["fastvv"]}])
def test_unknown_names_are_errors_before_anything_is_written(make_plan, change):
    with pytest.raises(VispressError, match="did you mean"):
        make_plan(**change)


def test_dtype_is_that_of_weights_and_answers(make_plan, tmp_path):
    run(make_plan(dtype="bf16", methods=[], tasks=["count"]), tmp_path)
    data = json.loads(stored(tmp_path)["none"].read_text())
    assert data["provenance"]["dtype"] == "bfloat16"
