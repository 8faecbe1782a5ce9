"""Arguments of harness plug-ins: read, checked before weights are read, and what was kept counted.

The harnesses themselves are tested in tests/integrations (`make integrations`).
"""

import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch

from tests.tiny_checkpoints import picture, save_checkpoint
from vispress.bench.model.checkpoints import load_checkpoint
from vispress.bench.tasks.task import Prompt
from vispress.errors import (
    BudgetError,
    ConfigError,
    UnsupportedMethodError,
    VispressError,
)
from vispress.integrations.options import Tally, read_compression, watch
from vispress.integrations.vlmevalkit import main, parse

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint("llava", tmp_path_factory.mktemp("checkpoint") / "llava")


def test_arguments_become_a_method():
    found = read_compression({"method": "fastv", "keep_ratio": 0.25, "layer": 2})
    assert (found.method.name, found.method.keep_ratio, found.method.layer) == ("fastv", 0.25, 2)
    assert found.label == "fastv-keep_ratio=0.25-layer=2"
    assert found.call == {}
    listed = read_compression({"method": "pyramiddrop", "layers": "[1, 2, 3]", "keep_ratio": None})
    assert listed.method.layers == (1, 2, 3)
    placed = read_compression({"method": "divprune", "num_tokens": 4, "positions": "compact"})
    assert placed.call == {"positions": "compact"}
    assert read_compression({"method": "none"}).method is None
    path = ROOT / "configs" / "methods" / "fastv.yaml"
    assert read_compression({"config": str(path)}).method.name == "fastv"


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, ConfigError, "give method=NAME or config"),
        ({"method": "none", "config": "x.yaml"}, ConfigError, "give method=NAME or config"),
        ({"method": "fastvv"}, UnsupportedMethodError, "did you mean 'fastv'"),
        ({"method": "fastv", "layr": 2}, ConfigError, "'layr'.*did you mean 'layer'"),
        ({"method": "fastv", "pretraned": "x"}, ConfigError, "did you mean 'pretrained'"),
        ({"method": "fastv", "keep_ratio": 0.5, "num_tokens": 3}, BudgetError, "keep_ratio"),
        ({"method": "fastv", "keep_ratio": 1.5}, BudgetError, "1.5"),
        ({"method": "fastv", "layer": "{"}, ConfigError, "the value .* is not valid YAML"),
        ({"method": "none", "keep_ratio": 0.5}, ConfigError, "method none takes nothing"),
        ({"method": "none", "positions": "compact"}, ConfigError, "takes nothing"),
        ({"config": "nowhere.yaml"}, ConfigError, "cannot read nowhere"),
        ({"config": "x.yaml", "keep_ratio": 0.5}, ConfigError, "config x.yaml takes nothing"),
    ],
)
def test_bad_arguments_are_named(given, error, message):
    with pytest.raises(error, match=message):
        read_compression(given, ["pretrained", "device"])


def test_no_method_has_a_hyper_parameter_that_a_harness_model_takes():
    from dataclasses import fields

    from vispress.registry import get_method, list_methods

    taken = {"pretrained", "revision", "device", "dtype", "batch_size", "device_map", "use_cache"}
    taken |= {"min_pixels", "max_pixels", "total_pixels", "fps", "max_num_frames", "chat_template"}
    taken |= {"attn_implementation", "system_prompt", "method", "config", "positions", "backend"}
    for name in list_methods():
        assert not taken & {field.name for field in fields(get_method(name))}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"method": "fastv"}, BudgetError, "needs a budget"),
        ({"method": "fastv", "keep_ratio": 0.5, "layer": 9}, VispressError, "layer"),
        ({"method": "fastv", "keep_ratio": 0.5, "positions": "odd"}, ConfigError, "positions"),
    ],
)
def test_what_cannot_work_fails_without_weights(folder, tmp_path, given, error, message):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(error, match=message):
        read_compression(given).check(str(tmp_path))
    read_compression({"method": "fastv", "keep_ratio": 0.5}).check(str(tmp_path))


def test_what_was_kept_is_counted(folder):
    subject = load_checkpoint(str(folder))
    image = picture(9, 9, 0)
    prompts = [Prompt((image,), "<image>\nWhat?", ""), Prompt((image, image), "<image><image>", "")]
    for given, kept in (({"method": "none"}, 108), ({"method": "divprune", "num_tokens": 5}, 15)):
        tally, compression = Tally(), read_compression(given)
        compression.apply(subject.model)
        watch(subject.model, compression, tally)
        subject.answer(prompts, 2)
        # text alone has no visual tokens, and no report of its own
        subject.answer([Prompt((), "Words", "")], 2)
        assert (tally.prompts, tally.visual, tally.end, tally.mean) == (2, 108, kept, kept)
        assert tally.averages()["kept_mean_ratio"] == pytest.approx(kept / 108)
        del subject.model.generate
    tally.clear()
    assert tally == Tally()


def test_the_first_error_stays_and_stops_what_follows(folder, monkeypatch):
    subject = load_checkpoint(str(folder))
    tally, compression = Tally(), read_compression({"method": "none"})
    watch(subject.model, compression, tally)
    calls = []

    def broken(*_, **__):
        calls.append(1)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(subject.model, "forward", broken)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="out of memory"):
            subject.model.generate(input_ids=torch.tensor([[5]]), max_new_tokens=1)
    assert len(calls) == 1
    assert isinstance(tally.error, RuntimeError)


def test_entry_points_name_what_is_there():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    module, _, function = data["lmms_eval.models"]["vispress"].partition(":")
    assert callable(getattr(import_module(module), function))


def test_importing_a_plug_in_imports_no_harness():
    import vispress.integrations.lmms_eval as plugin

    assert "lmms_eval" not in sys.modules
    assert "vlmeval" not in sys.modules
    with pytest.raises(AttributeError, match="no attribute 'chat_llama'"):
        _ = plugin.chat_llama


def test_arguments_of_the_vlmevalkit_launcher():
    line = "--model m --method fastv --keep-ratio 0.25 --set layer=3 --device cpu -- --data A B"
    own, rest = parse(line.split())
    assert rest == ["--data", "A", "B"]
    assert own["compression"] == {
        "method": "fastv",
        "config": None,
        "keep_ratio": 0.25,
        "num_tokens": None,
        "layer": 3,
    }
    assert own["checkpoint"] == {"device": "cpu", "dtype": torch.bfloat16, "max_new_tokens": 512}
    with pytest.raises(ConfigError, match="--model=x behind '--'"):
        parse([*line.split(), "--model=x"])


def test_the_launcher_says_what_is_wrong_in_one_line(capsys):
    assert main(["--model", "m", "--method", "fastvv", "--", "--data", "A"]) == 2
    assert "did you mean 'fastv'" in capsys.readouterr().err
    assert main(["--model", "m", "--method", "none", "--", "--data", "A"]) == 2
    assert "VLMEvalKit is not installed" in capsys.readouterr().err
