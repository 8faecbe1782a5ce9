"""The results in `benchmarks/results`: each folder can be read, shown and joined."""

import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
from benchmarks import distil_voco, method_table, trained_table
from benchmarks.fine_tune import with_gists
from tests.bench.stored import change

from vispress import compress_model, compression_report
from vispress.bench.model.loaded_model import load_named_model
from vispress.bench.page.results import read as read_page
from vispress.bench.results.files import ResultsError
from vispress.bench.results.merge_runs import merge_runs
from vispress.bench.results.store import MANIFEST, read_results
from vispress.bench.results.stored import cell_fault
from vispress.distillation.scenes import training_prompts

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
FOLDERS = sorted(path.parent.name for path in RESULTS.glob(f"*/{MANIFEST}"))
ARCHIVED = sorted(path.parent.name for path in RESULTS.glob("*/cells.tar.xz"))


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """A committed folder as its README says to unpack it, once."""
    found = {}

    def unpack(name):
        if name not in found:
            found[name] = tmp_path_factory.mktemp(name)
            shutil.copy(RESULTS / name / MANIFEST, found[name])
            if name in ARCHIVED:
                extract(RESULTS / name / "cells.tar.xz", found[name])
        return found[name]

    return unpack


def extract(archive, folder):
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")


def test_there_are_results():
    assert {"offline", "offline_clips", "offline_qwen"} <= set(ARCHIVED) <= set(FOLDERS)


@pytest.mark.slow(cases=2)
@pytest.mark.parametrize("name", FOLDERS)
def test_every_folder_can_be_read(unpacked, name):
    manifest, cells = read_results(unpacked(name))
    planned = manifest["plan"]["cells"]
    assert [cell["cell"] for cell in cells] == (planned if name in ARCHIVED else [])


@pytest.mark.slow
def test_a_second_run_of_some_cells_can_be_read(unpacked, tmp_path):
    manifest, _ = read_results(unpacked("offline_qwen"))
    extract(RESULTS / "offline_qwen" / "again.tar.xz", tmp_path)
    cells = [json.loads(path.read_text()) for path in (tmp_path / "cells").iterdir()]
    assert len(cells) == 33
    assert {cell_fault(cell, cell["key"], manifest) for cell in cells} == {None}


def test_a_changed_mark_is_seen(unpacked, tmp_path):
    folder = tmp_path / "r"
    shutil.copytree(unpacked("offline_clips"), folder)

    def flip(cell):
        task = cell["tasks"]["clip_order"]
        task["right"] = "10"[int(task["right"][0])] + task["right"][1:]

    change(folder / "cells" / "none.json", flip)
    with pytest.raises(ResultsError, match=r"none\.json is damaged: tasks\.clip_order: mean is"):
        read_results(folder)


@pytest.mark.slow
def test_a_page_can_be_made(unpacked):
    assert read_page(unpacked("offline_clips")).summary.missing == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "offline_clips" else pytest.mark.full) for n in ARCHIVED],
)
def test_every_folder_can_be_joined(unpacked, tmp_path, name):
    """The runs that it was made of are gone, so halves of it stand for two runs."""
    halves = [tmp_path / "first", tmp_path / "second"]
    keys = [cell["key"] for cell in read_results(unpacked(name))[0]["plan"]["cells"]]
    for half, left in zip(halves, (keys[1::2], keys[2::2]), strict=True):
        shutil.copytree(unpacked(name), half)
        for key in left:
            (half / "cells" / f"{key}.json").unlink()
    out = tmp_path / "out"
    assert merge_runs(halves, out) == 1
    _, cells = read_results(out)
    assert [cell["key"] for cell in cells] == keys
    # joined once, it can be joined again
    assert merge_runs([out, halves[0]], tmp_path / "again") == len(keys) - len(keys[1::2])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "offline_clips" else pytest.mark.full) for n in ARCHIVED],
)
def test_the_table_by_method_says_what_the_cells_say(name):
    told = method_table.TABLE.read_text(encoding="utf-8").splitlines(keepends=True)
    assert [told[0], *(line for line in told if line.startswith(f"{name},"))] == (
        method_table.table((name,)).splitlines(keepends=True)
    )


TRAINED = sorted(path.parent for path in RESULTS.glob("trained/**/modules.safetensors"))
TRAINED = [folder for folder in TRAINED if folder.name != "compressor"]  # of a tuned model


@pytest.mark.parametrize(
    "folder", TRAINED, ids=lambda folder: f"{folder.parent.name}-{folder.name}"
)
def test_trained_compressors_fit_the_reference_model(folder):
    name = "reference-qwen" if folder.parent.name == "qwen" else "reference"
    loaded = load_named_model(name, "cpu", "fp32")
    compress_model(loaded.model, config=folder)
    loaded.answer(list(training_prompts(1)), 1)
    assert not any("untrained" in note for note in compression_report(loaded.model).notes)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 1e6


@pytest.mark.slow
def test_distilled_voco_tokens_answer_on_the_reference_model():
    """Without their picture, as measured: the committed file holds what it says."""
    folder = RESULTS / "trained" / "voco_distilled"
    loaded = distil_voco.learned_model(folder / "learned.safetensors")
    prompts = [replace(p, text=with_gists(p.text, 16)) for p in training_prompts(32, seed=11)]
    answers = loaded.answer(prompts, 4)
    (sample, *_) = compression_report(loaded.model).samples
    assert sample.images
    right = fmean(said == prompt.answer for said, prompt in zip(answers, prompts, strict=True))
    told = json.loads((folder / "result.json").read_text())["right"]["rank 20"]
    assert right == pytest.approx(fmean(map(fmean, told.values())), abs=0.2)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 1e6


TUNED = {"pmod": "0.5", "gamma_mod": "0.5", "voco": "0.111", "voco_distilled": "0.111"}


@pytest.mark.slow
def test_tables_of_trained_compressors_are_the_scripts(tmp_path, capsys):
    for name in ("relevance", "trained"):
        extract(RESULTS / name / "runs.tar.xz", tmp_path)
    beside = [str(tmp_path / f"run_{name}_llava") for name in ("others", "high", "ours")]
    own, early = str(tmp_path / "run_trained"), str(tmp_path / "run_inllm")
    trained_table.main(["--run", own, "--beside", *beside, early])
    tuned = [
        word
        for name, ratio in TUNED.items()
        for word in ("--tuned", str(RESULTS / "trained" / name), ratio)
    ]
    written = capsys.readouterr().out
    trained_table.main([*tuned, "--beside", *beside])
    written += f"\n{capsys.readouterr().out}"
    beside = [str(tmp_path / f"run_{name}_qwen") for name in ("others", "ours")]
    trained_table.main(["--run", str(tmp_path / "run_trained_qwen"), "--beside", *beside])
    written += f"\n{capsys.readouterr().out}"
    told = (RESULTS / "trained" / "README.md").read_text(encoding="utf-8")
    tables = written.strip().split("\n\n")
    assert len(tables) == 6
    assert all(table in told for table in tables)


def test_tables_of_ablations_are_the_scripts(tmp_path, capsys):
    for name in ("runs", "ablation"):
        extract(RESULTS / "relevance" / f"{name}.tar.xz", tmp_path)
    beside = [str(tmp_path / f"run_{name}_llava") for name in ("others", "high", "ours")]
    run = ["--run", str(tmp_path / "run_ablation"), "--only", "relevance_dpp", "divprune"]
    trained_table.main([*run, "--beside", *beside])
    told = (RESULTS / "relevance" / "README.md").read_text(encoding="utf-8")
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert len(tables) == 2
    assert all(table in told for table in tables)
