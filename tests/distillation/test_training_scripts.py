"""Scripts that train the reference model's compressors: what is kept, and what goes on from it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks import distil_voco, fine_tune, halved, lessons, relevance_answers
from benchmarks.halved import module_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from vispress import compress_model, remove_compression, save_compression
from vispress.bench.model.loaded_model import load_named_model
from vispress.reference import compressor

FIRST, NEXT = "covipal attention", "covipal answers"


@pytest.mark.slow
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


def test_questions_behind_a_shared_picture_are_those_of_one_pass() -> None:
    """Two pictures of three questions each: losses, and gradients through what is in the cache."""
    loaded = load_named_model("reference", "cpu", "fp32")
    model, tokenizer = loaded.model, loaded.processor.tokenizer
    tokenizer.add_tokens(fine_tune.GIST, special_tokens=True)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    compress_model(model, "voco")
    model.train()
    args = distil_voco.parse(["--pictures", "2", "--questions", "3", "--out", "unused"])
    lot = next(distil_voco.lots(tokenizer, args))
    assert lot.ids.shape[0] == 6
    assert (lot.labels[:, -1:] == tokenizer.eos_token_id).any()
    word = model.get_input_embeddings().weight

    def found(logits: Tensor) -> tuple[Tensor, Tensor]:
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), lot.labels[:, 1:].flatten())
        (gradient,) = torch.autograd.grad(loss, word)
        return loss.detach(), gradient[-1]

    loss, gradient = found(distil_voco.ask(loaded.processor, model, lot, 2).logits)
    images = [image for image in lot.images for _ in range(3)]
    text = [fine_tune.with_gists("<image>", 2)] * 6
    inputs = loaded.processor(images=images, text=text, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    ids = torch.cat([inputs["input_ids"], lot.ids], dim=1)
    whole = model(
        input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False,
        pixel_values=inputs["pixel_values"],
    ).logits  # fmt: skip
    expected, of_word = found(whole[:, length:])
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, of_word, rtol=1e-3, atol=1e-5)
    assert float(of_word.abs().max()) > 1e-3


def test_the_distance_of_hidden_states_by_hand() -> None:
    """Two rows of one layer; the last token repeats what ends the answer and does not count."""
    lot = distil_voco.Lot([], torch.tensor([[5, 2, 2]]), torch.tensor([[-100, 2, -100]]))
    theirs = torch.tensor([[[1.0, 0.0], [-1.0, 2.0], [9.0, 9.0]]])
    mine = theirs + torch.tensor([[[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]])
    own, other = (SimpleNamespace(hidden_states=(None, x)) for x in (mine, theirs))
    found = distil_voco.hidden_distance(lot, own, other, 2)
    assert float(found) == pytest.approx(0.5 / 2.0)  # a variance of 2 in each channel


def test_what_is_kept_of_a_distilled_model(tmp_path: Path) -> None:
    """A change of rank 2 in each projection, and any change elsewhere, come back."""
    loaded, before = distil_voco.with_word()
    now = dict(loaded.model.named_parameters())
    with torch.no_grad():
        for name, value in before.items():
            more = torch.randn(2, value.shape[-1], generator=torch.Generator().manual_seed(1))
            twice = torch.arange(len(value))[:, None] % 2
            added = torch.where(twice == 0, more[0], more[1]) if value.ndim == 2 else more[0]
            now[name].copy_(value + 0.1 * added)
    kept = distil_voco.low_rank(loaded.model, before, 2)
    assert {value.dtype for value in kept.values()} == {torch.float16}
    save_file(kept, tmp_path / "learned.safetensors")
    again = dict(
        distil_voco.learned_model(tmp_path / "learned.safetensors").model.named_parameters()
    )
    assert len(before) > 50
    for name, value in now.items():
        torch.testing.assert_close(again[name], value, rtol=2e-3, atol=2e-3)
        assert torch.equal(again[name], value) == (name not in before), name


@pytest.mark.full
def test_pictures_are_distilled(tmp_path: Path) -> None:
    words = ["--steps", "1", "--pictures", "2", "--questions", "2", "--asked", "1", "--out"]
    distil_voco.main([*words, str(tmp_path)])
    told = json.loads((tmp_path / "result.json").read_text())
    assert (told["gists"], len(told["curve"]), len(told["curve"][0])) == (16, 1, 3)
    assert set(told["right"]) == {"untouched", "trained", "rank 20"}


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
