"""Scripts that train the reference model's compressors: what is kept, and what goes on from it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmarks import fine_tune, halved, lessons, relevance_answers
from benchmarks.halved import module_of
from safetensors.torch import load_file

from vispress import compress_model, remove_compression, save_compression
from vispress.bench.model.loaded_model import load_named_model
from vispress.reference import compressor

FIRST, NEXT = "covipal attention", "covipal answers"


def test_a_lesson_goes_on_from_one_that_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, taught = load_named_model("reference", "cpu", "fp32"), []

    def teach(loaded: Any, name: str, start_from: Path | None) -> tuple[float, float]:
        taught.append((name, start_from))
        compress_model(loaded.model, method="covipal", **lessons.EARLY)
        return 1.0, 0.5

    monkeypatch.setattr(lessons, "teach", teach)
    monkeypatch.setattr(lessons, "QUESTIONS", 2)
    for name in (FIRST, NEXT):
        lessons.move(loaded, name, tmp_path)
    assert taught == [(FIRST, None), (NEXT, tmp_path / "covipal-attention")]
    assert {path.name for path in tmp_path.iterdir()} == {"covipal-attention", "covipal-answers"}
    lessons.move(loaded, NEXT)
    assert [name for name, _ in taught[2:]] == [FIRST, NEXT]


def test_halves_are_what_was_rounded(tmp_path: Path) -> None:
    loaded = load_named_model("reference", "cpu", "fp32")
    compress_model(loaded.model, method="vision_selector", num_tokens=16)
    save_compression(loaded.model, tmp_path / "whole", data={"samples": 3})
    whole = load_file(tmp_path / "whole" / "modules.safetensors")
    remove_compression(loaded.model)
    (tmp_path / "whole" / "curve.json").write_text("{}")
    halved.main([str(tmp_path / "whole"), "--into", str(tmp_path / "halves")])
    folder = tmp_path / "halves" / "whole"
    assert (folder / "curve.json").read_text() == "{}"
    assert json.loads((folder / "vispress.json").read_text())["data"] == {"samples": 3}
    compress_model(loaded.model, config=folder)
    own = module_of(loaded.model).state_dict()
    for name, value in whole.items():
        assert own[name].equal(value.half().float())


def test_voco_tokens_stand_behind_the_picture() -> None:
    assert fine_tune.with_gists("<image> what colour", 2) == "<image> <voco> <voco> what colour"
    assert fine_tune.with_gists("<image> what colour", 0) == "<image> what colour"


@pytest.mark.full
def test_a_word_is_learned_beside_lora(tmp_path: Path) -> None:
    words = ["voco", "--gists", "2", "--steps", "1", "--questions", "1", "--out"]
    fine_tune.main([*words, str(tmp_path)])
    told = json.loads((tmp_path / "result.json").read_text())
    assert (told["gists"], len(told["loss"])) == (2, 1)
    assert set(told["right"]) == {"untouched", "untrained", "trained"}
    names = load_file(tmp_path / "adapter.safetensors")
    rows = [value for name, value in names.items() if "embed_tokens" in name]
    assert [tuple(row.shape) for row in rows] == [(1, 192)]


@pytest.mark.full
def test_relevance_learns_from_answers(tmp_path: Path) -> None:
    words = ["--samples", "40", "--steps", "1", "--batch-size", "8", "--out"]
    relevance_answers.main([*words, str(tmp_path)])
    assert len(json.loads((tmp_path / "curve.json").read_text())["loss"]) == 1
    loaded = SimpleNamespace(model=load_named_model("reference", "cpu", "fp32").model)
    compress_model(loaded.model, config=tmp_path)
    shipped = load_file(compressor() / "modules.safetensors")
    own = module_of(loaded.model).state_dict()
    assert own.keys() == shipped.keys()
    assert any(not own[name].equal(shipped[name]) for name in own)
