"""lmms-eval end to end: its own model, ours uncompressed (the same answers), ours compressed."""

import functools
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from tests.tiny_checkpoints import picture

from vispress.api import compression_report
from vispress.errors import BudgetError, ConfigError, UnsupportedMethodError

# raised in lmms-eval's own calls of processors
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

BASES = {"llava": "llava_hf", "qwen2_5_vl": "qwen2_5_vl", "qwen3_vl": "qwen3_vl"}
TASK = """
dataset_path: json
dataset_kwargs:
  data_files: {rows}
task: local_vqa
test_split: train
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 5, temperature: 0, do_sample: false}}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
UTILS = """
from PIL import Image


def visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
"""


@pytest.fixture(scope="session")
def task(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("task")
    (folder / "local_vqa.yaml").write_text(TASK.format(rows=rows / "rows.jsonl"))
    (folder / "utils.py").write_text(UTILS)
    return folder


def arguments(folder, family, **more):
    pixels = {} if family == "llava" else {"min_pixels": 256, "max_pixels": 6400}
    pairs = {"pretrained": folder, "device_map": "cpu"} | pixels | more
    return ",".join(f"{key}={value}" for key, value in pairs.items())


def evaluate(model, text, task, *, simple):
    """Answers and throughput of lmms-eval's own evaluator."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    results = simple_evaluate(
        model=model,
        model_args=text,
        tasks=["local_vqa"],
        batch_size=1,
        device="cpu",
        force_simple=simple,
        bootstrap_iters=0,
        task_manager=TaskManager("ERROR", include_path=str(task), model_name=model),
    )
    answers = [sample["filtered_resps"] for sample in results["samples"]["local_vqa"]]
    return answers, results.get("throughput", {})


@pytest.mark.parametrize("simple", [False, True], ids=["chat", "simple"])
def test_uncompressed_is_lmms_evals_own_and_compressed_keeps_less(folders, family, simple, task):
    base, folder = BASES[family], folders[family]
    plain, _ = evaluate(base, arguments(folder, family), task, simple=simple)
    assert len({answer for (answer,) in plain}) == 2
    ours = f"vispress_{base}"
    none, counted = evaluate(ours, arguments(folder, family, method="none"), task, simple=simple)
    assert none == plain
    assert counted["avg_visual_tokens"] == counted["avg_kept_at_end"] > 0
    given = arguments(folder, family, method="divprune", num_tokens=4)
    fewer, kept = evaluate(ours, given, task, simple=simple)
    assert fewer != plain
    assert kept["avg_visual_tokens"] == counted["avg_visual_tokens"]
    assert kept["avg_kept_at_end"] == kept["avg_kept_mean"] == 4


def scored(folder, answers, **given):
    """Losses of answers to one question, and what was kept of its picture for each."""
    from lmms_eval.api.instance import Instance
    from lmms_eval.models import get_model

    # called as its evaluator does, which (0.7.3) turns scores into text before it compares them
    model = get_model("vispress_llava_hf", force_simple=True)(
        pretrained=str(folder), device="cpu", device_map="cpu", **given
    )
    model.task_dict = {"local": {"train": [{"image": picture(40, 60, 0)}]}}
    losses, kept = [], []
    for answer in answers:
        call = ("What is it?", f" {answer}", lambda doc: [doc["image"]], 0, "local", "train")
        request = Instance(
            request_type="loglikelihood",
            arguments=call,
            idx=0,
            metadata={"task": "local", "doc_id": 0, "repeats": 1},
        )
        losses += model.loglikelihood([request])
        if given["method"] != "none":
            report = compression_report(model.model)
            kept.append([p.kept for p in report.samples[0].images[0].placements])
    return losses, kept


def test_choices_are_scored_by_what_the_prompt_keeps(folders):
    """Whatever is answered: the answer has no say in what is kept."""
    answers = ("red", "a longer answer", "blue?")
    plain, _ = scored(folders["llava"], answers, method="none")
    losses, kept = scored(folders["llava"], answers, method="pyramiddrop")
    assert kept[0]
    assert kept == [kept[0]] * 3
    assert [loss for loss, _ in losses] != [loss for loss, _ in plain]
    whole, _ = scored(folders["llava"], answers, method="fastv", keep_ratio=1.0)
    assert [loss for loss, _ in whole] == pytest.approx([loss for loss, _ in plain])


def test_the_command_line_writes_what_was_kept(folders, task, tmp_path, monkeypatch):
    from lmms_eval.__main__ import cli_evaluate

    given = arguments(folders["llava"], "llava", method="fastv", keep_ratio=0.25, layer=2)
    line = (
        f"lmms-eval --model vispress_llava_hf --model_args {given} --tasks local_vqa --device cpu"
    )
    options = ["--include_path", str(task), "--output_path", str(tmp_path), "--batch_size", "1"]
    monkeypatch.setattr(sys, "argv", [*line.split(), *options])
    cli_evaluate()
    (file,) = tmp_path.rglob("*_results.json")
    found = json.loads(file.read_text())
    assert found["throughput"]["avg_kept_at_end"] == 9
    assert found["config"]["model"] == "vispress_llava_hf"


def test_a_registry_lists_all_three():
    from lmms_eval.models import get_model, list_available_models

    for base in BASES.values():
        assert f"vispress_{base}" in list_available_models()
        assert get_model(f"vispress_{base}").is_simple is False
        assert get_model(f"vispress_{base}", force_simple=True).is_simple is True


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, ConfigError, "give method"),
        ({"method": "fastvv"}, UnsupportedMethodError, "unknown method 'fastvv'"),
        ({"method": "fastv", "keep_ratio": 0.5, "num_tokens": 4}, BudgetError, "num_tokens"),
        ({"method": "fastv", "keep_ratio": 0.5, "layr": 2}, ConfigError, "'layr'"),
        ({"method": "fastv"}, BudgetError, "needs a budget"),
        ({"method": "visionzip", "num_tokens": 4}, UnsupportedMethodError, "cls_attention"),
    ],
)
def test_bad_arguments_fail_before_weights_are_read(folders, tmp_path, given, error, message):
    from lmms_eval.models import get_model

    # only a configuration: reading weights would be another error
    config = (folders["qwen2_5_vl"] / "config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(config)
    with pytest.raises(error, match=message):
        get_model("vispress_qwen2_5_vl")(pretrained=str(tmp_path), device="cpu", **given)


def test_remote_code_is_refused_where_the_model_would_take_it(folders):
    from lmms_eval.models import get_model

    model = get_model("vispress_llava_hf")
    with pytest.raises(ConfigError, match="trust_remote_code=True is refused"):
        model(pretrained=str(folders["llava"]), method="none", trust_remote_code=True)


def test_an_error_that_lmms_eval_swallows_is_raised(folders, task, monkeypatch):
    from transformers import LlavaForConditionalGeneration

    @functools.wraps(LlavaForConditionalGeneration.forward)  # generate looks at its signature
    def broken(*_, **__):
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(LlavaForConditionalGeneration, "forward", broken)
    given = arguments(folders["llava"], "llava")
    answers, _ = evaluate("llava_hf", given, task, simple=False)
    assert answers == [[""], [""]]
    with pytest.raises(RuntimeError, match="broken on purpose"):
        evaluate("vispress_llava_hf", f"{given},method=none", task, simple=False)


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    """`examples/lmms_eval_run.py`, on the model that ships and a task of its own."""
    example = Path(__file__).parents[2] / "examples" / "lmms_eval_run.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(example.parent))
    monkeypatch.setattr(sys, "argv", [example.name, "--questions", "4"])
    runpy.run_path(str(example), run_name="__main__")
    sys.modules.pop("common")
    found = dict(re.findall(r"^(method=\w+).*right, (\d+) tokens", capsys.readouterr().out, re.M))
    assert (found["method=none"], found["method=divprune"]) == ("144", "36")
