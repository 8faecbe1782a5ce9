"""`vispress train-compressor`: from the shipped model to a folder that compresses it."""

import json
import sys
from pathlib import Path

import pytest

from vispress import cli, compress_model, compression_report, remove_compression
from vispress.bench.model import loaded_model
from vispress.bench.model.loaded_model import load_named_model
from vispress.reference import heldout
from vispress.reference.evaluation.evaluate import generate_words


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["vispress", "train-compressor", *words])
    cli.main()


@pytest.mark.slow
def test_a_folder_comes_out_that_compresses_the_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made"
    options = ["--samples", "40", "--steps", "6", "--set", "width=16", "--set", "blocks=1"]
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, *options, "--keep-ratio", "0.25", "--out", str(out))
    assert ended.value.code == 0
    assert "written" in capsys.readouterr().out
    curve = json.loads((out / "curve.json").read_text())
    assert len(curve["loss"]) == 6
    assert curve["held_out"][1] < curve["held_out"][0]
    card = json.loads((out / "vispress.json").read_text())
    assert card["data"]["samples"] == 40
    assert card["data"]["model"] == "reference"

    loaded = load_named_model("reference", "cpu", "fp32")
    compress_model(loaded.model, config=out)
    try:
        image, prompt, _, _ = heldout("attribute", 1)[0]
        generate_words(loaded.model, loaded.processor, [prompt], batch=1, images=[image])
        report = compression_report(loaded.model)
    finally:
        remove_compression(loaded.model)
    assert report.samples[0].images[0].num_kept == 36
    assert not any("untrained" in note for note in report.notes)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--method", "fastv"], "method must be one of 'covipal', 'hicom', 'pvc', 'rel"),
        (["--stage", "answers"], "stage must be one of 'attention', got 'answers'"),
        (["--dtype", "int8"], "dtype must be one of"),
        (["--set", "width=7"], "width must be a multiple"),
        (["--keep-ratio", "1.5"], "keep_ratio"),
        (["--lr", "-1"], "lr must be a number in"),
        (["--lr", "nan"], "lr must be a number in"),
        (["--out", __file__], "is no folder that can be written"),
        (["--out", f"{__file__}/made"], "is no folder that can be written"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(
    options: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(loaded_model, "load_named_model", None)
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, *options)
    assert ended.value.code == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_a_folder_with_pickles_is_refused_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Behind hours of training it would be too late."""
    monkeypatch.setattr(loaded_model, "load_named_model", None)
    (tmp_path / "model.bin").touch()
    with pytest.raises(SystemExit):
        command(monkeypatch, "--out", str(tmp_path))
    assert "is a pickle" in " ".join(capsys.readouterr().err.split())
