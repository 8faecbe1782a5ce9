"""Methods on a vision encoder alone: what it gives, what is kept, and what is refused."""

import json
import shutil
import sys

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.tiny_checkpoints import picture
from vispress import cli
from vispress.analysis.encoder_tokens import choose, load_encoder
from vispress.errors import CheckpointError, UnsupportedMethodError
from vispress.methods import CDPruner, DivPrune, FasterVLM, FastV, Uniform, VisionZip, ZOOPrune

SIZES = {
    "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "image_size": 28,
    "patch_size": 7,
}  # fmt: skip
MADE = {
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SIZES)),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(intermediate_size=48, **SIZES)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(intermediate_size=48, **SIZES)),
}


@pytest.fixture(scope="module", params=MADE)
def folder(request, tmp_path_factory):
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp(request.param) / request.param
    MADE[request.param]().save_pretrained(out)
    return out


def test_an_encoder_gives_its_own_signals(folder):
    encoder = load_encoder(folder)
    tokens, seen = encoder.see(picture(40, 30, 0))
    assert seen.shape == (28, 28, 3)
    assert tokens.grid == (1, 4, 4)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((torch.from_numpy(seen).float() - mean) / std).permute(2, 0, 1)[None]
    with torch.inference_mode():
        out = encoder.model(pixels, output_attentions=True)
    attention = out.attentions[-1]
    first = 0 if folder.name == "siglip" else 1
    torch.testing.assert_close(tokens.features, out.last_hidden_state[:, first:])
    torch.testing.assert_close(tokens.column_attention, attention.mean(2)[..., first:])
    if first:
        torch.testing.assert_close(tokens.cls_attention, attention[:, :, 0, 1:])
        kept = choose(FasterVLM(num_tokens=5), tokens).kept
        best = attention[0, :, 0, 1:].mean(0).topk(5).indices
        assert kept == tuple(sorted(best.tolist()))
    else:
        with pytest.raises(UnsupportedMethodError, match="cls_attention, which an encoder alone"):
            choose(FasterVLM(num_tokens=5), tokens)
    for method in (DivPrune(num_tokens=5), Uniform(num_tokens=5)):
        assert choose(method, tokens).num_kept == 5
    assert choose(VisionZip(num_tokens=6, scores="column_mean"), tokens).num_kept == 6


@pytest.mark.parametrize("side", [42])
def test_another_size_is_interpolated(folder, side):
    tokens, seen = load_encoder(folder, side).see(picture(20, 20, 1))
    assert (tokens.num_visual, seen.shape[0]) == (36, 42)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (FastV(num_tokens=4, layer=2), "act once, before the LLM"),
        (CDPruner(num_tokens=4), "cdpruner reads text_embeddings"),
        (ZOOPrune(num_tokens=4), "zoo_prune reads projector"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_an_encoder_cannot_give_is_refused(folder, method, words):
    tokens, _ = load_encoder(folder).see(picture(28, 28, 2))
    with pytest.raises(UnsupportedMethodError, match=words):
        choose(method, tokens)


def test_what_is_no_encoder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="has no config"):
        load_encoder(tmp_path)
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 8, "n_positions": 8}
    from transformers import GPT2Config, GPT2Model

    GPT2Model(GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt")
    with pytest.raises(CheckpointError, match="no encoder of patches"):
        load_encoder(tmp_path / "gpt")


def test_show_draws_with_an_encoder(folder, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(folder, tmp_path / "encoder")
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    picture(40, 40, 3).save(photo := tmp_path / "p.png")
    (out := tmp_path / "kept.png").unlink(missing_ok=True)
    words = ["show", photo, "--encoder", folder, "--side", 42, "--method", "divprune"]
    words += ["--method", "uniform", "--num-tokens", 9, "--out", out]
    monkeypatch.setattr(sys, "argv", ["vispress", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    assert capsys.readouterr().out.count("9 of 36") == 2
    assert out.read_bytes().startswith(b"\x89PNG")
    assert load_encoder(folder).mean == (0.5, 0.5, 0.5)
