"""`vispress probe arank`: ranks by hand, the choice of layers, and what is written."""

from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from tests.laws.cases import model_of
from tests.tiny import Image, Sample, Text, make_inputs

from vispress import cli
from vispress.analysis.attention_ranks import choose_layers, mean_ranks
from vispress.bench.model import loaded_model
from vispress.config import load_config
from vispress.errors import ConfigError, VispressError
from vispress.methods import GammaMoD


class Fed:
    """What is seen of a loaded model: prompts are seeds."""

    def __init__(self) -> None:
        self.model: Any = model_of("llava", torch.float32)

    def encode(self, prompts: list[int]) -> dict[str, Any]:
        sample = Sample([Text(3 + prompts[0]), Image(), Text(4)])
        return make_inputs("llava", [sample], seed=prompts[0], dtype=torch.float32)


def test_ranks_are_means_over_heads_and_prompts() -> None:
    fed: Any = Fed()
    before = fed.model.model.language_model.config._attn_implementation
    found = mean_ranks(fed, [0, 2])
    assert fed.model.model.language_model.config._attn_implementation == before
    assert found.shape == (6,)
    expected = torch.zeros(6)
    fed.model.model.language_model.set_attn_implementation("eager")
    for seed in (0, 2):
        with torch.no_grad():
            out = fed.model(**fed.encode([seed]), output_attentions=True)
        for layer, one in enumerate(out.attentions):
            below = torch.stack([head.tril(-1) for head in one[0]])
            expected[layer] += sum(float(torch.linalg.matrix_rank(h)) for h in below) / len(below)
    fed.model.model.language_model.set_attn_implementation(before)
    torch.testing.assert_close(found, expected / 2)
    with pytest.raises(ConfigError, match="there is none"):
        mean_ranks(fed, [])


def test_layers_of_the_lowest_rank_are_chosen_but_never_the_first() -> None:
    ranks = [1.0, 9.0, 3.0, 5.0, 3.0]
    assert choose_layers(ranks, share=0.5) == (2, 4)
    assert choose_layers(ranks, share=0.25) == (2,)
    assert choose_layers(ranks, share=1.0) == (1, 2, 3, 4)
    assert choose_layers(ranks, share=0.0, threshold=6.0) == (2, 3, 4)
    with pytest.raises(ConfigError, match=r"threshold=2\.0; the lowest rank is 3\.0"):
        choose_layers(ranks, share=0.5, threshold=2.0)


def test_the_command_writes_a_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "own.yaml"
    words = ["probe", "arank", "--samples", "2", "--share", "0.4", "--out", str(out)]
    assert cli.app(words, standalone_mode=False) in (None, 0)
    method = load_config(out)
    assert isinstance(method, GammaMoD)
    assert len(method.layers or ()) == 2
    assert "written" in capsys.readouterr().out
    assert "probe arank on 2 prompts" in out.read_text()


@pytest.mark.parametrize("options", [["--capacity", "2"], ["--out", "nowhere/own.yaml"]])
def test_what_cannot_be_is_refused_before_a_model_is_loaded(
    options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded_model, "load_named_model", None)
    with pytest.raises(VispressError, match=r"capacity must be|cannot write nowhere"):
        cli.app(["probe", "arank", *options], standalone_mode=False)


def test_it_tells_how_many_prompts_there_were(tmp_path: Path) -> None:
    pictures, out = tmp_path / "pictures", tmp_path / "own.yaml"
    pictures.mkdir()
    PIL.Image.new("RGB", (64, 64)).save(pictures / "one.png")
    words = ["probe", "arank", "--data", str(pictures), "--question", "what ?", "--out", str(out)]
    assert cli.app(words, standalone_mode=False) in (None, 0)
    assert "probe arank on 1 prompts" in out.read_text()
