"""The shipped model: loads offline, answers, and says so when it is damaged."""

import shutil

import pytest
import torch

from vispress import reference
from vispress.bench.model.checkpoints import open_skeleton
from vispress.bench.model.loaded_model import load_named_model
from vispress.errors import CheckpointError
from vispress.reference import KINDS, folders, heldout, load
from vispress.reference.evaluation.evaluate import accuracy
from vispress.reference.folders import SHIPPED
from vispress.reference.model.checkpoint import export, read
from vispress.reference.model.llava import build_model, reference_config
from vispress.reference.model.processor import build_processor

needs_shipped = pytest.mark.skipif(not SHIPPED.exists(), reason="no checkpoint is built in")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "checkpoint"
    export(build_model(reference_config(vision_layers=2, text_layers=1), seed=0), out)
    return out


def test_export_and_read_round_trip(folder):
    model, processor = read(folder, dtype=torch.float16)
    original = build_model(reference_config(vision_layers=2, text_layers=1), seed=0).half()
    ours, theirs = model.state_dict(), original.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.vision_feature_layer == -2
    assert not model.training
    image, prompt, _, _ = heldout("where", 1)[0]
    inputs = processor(
        images=[image] * 2,
        text=[prompt, "<image> where is the ring ? :"],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    assert (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist() == [144, 144]
    fresh = build_processor()(images=image, text=[prompt], return_tensors="pt")
    again = processor(images=image, text=[prompt], return_tensors="pt")
    assert all(torch.equal(fresh[k], again[k]) for k in fresh)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(folder, tmp_path, name):
    copy = shutil.copytree(folder, tmp_path / "c")
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        read(copy)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_truncated_file_is_an_error(folder, tmp_path, name):
    copy = shutil.copytree(folder, tmp_path / "c")
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        read(copy)


def test_weights_that_do_not_fit_are_an_error_not_a_random_fill(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "c")
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(
        text.replace('"num_hidden_layers": 1', '"num_hidden_layers": 2')
    )
    with pytest.raises(CheckpointError, match="missing_keys"):
        read(copy)


@needs_shipped
def test_the_shipped_model_is_a_small_plain_llava():
    model, processor = load()
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert type(processor).__name__ == "LlavaProcessor"
    assert 2e6 < sum(p.numel() for p in model.parameters()) < 8e6
    assert sum(f.stat().st_size for f in SHIPPED.iterdir()) < 16 << 20
    assert (SHIPPED / "MODEL_CARD.md").exists()
    assert not list(SHIPPED.glob("*.bin"))


@pytest.mark.slow
@needs_shipped
def test_the_shipped_model_answers():
    model, processor = load()
    scores = accuracy(model, processor, n=4, seed=5, kinds=KINDS)
    assert sum(scores.values()) / len(scores) > 0.4


def test_what_is_in_a_distribution_that_is_not_installed_says_so(monkeypatch, tmp_path):
    gone = tmp_path / "checkpoint_qwen2_5_vl"
    monkeypatch.setitem(folders.SHIPPED_BY_NAME, "qwen2_5_vl", gone)
    monkeypatch.setitem(folders._BY_PLAN, "reference-qwen", gone)
    monkeypatch.setitem(folders.COMPRESSORS, "qwen2_5_vl", gone)
    for ask in (
        lambda: reference.load(architecture="qwen2_5_vl"),
        lambda: reference.compressor(architecture="qwen2_5_vl"),
        lambda: load_named_model("reference-qwen"),
        lambda: open_skeleton("reference-qwen"),
    ):
        with pytest.raises(CheckpointError, match="pip install vispress-references"):
            ask()
