"""Fitting the positional trend of a model's attention, from profiles and from the command."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tests.methods.helpers import only

from vispress import cli, compress_model, compression_report, remove_compression
from vispress.analysis.fit_debias import corrected, draw_prompts
from vispress.analysis.trend import Fit, Profile, fit_trend, measure
from vispress.config import load_config
from vispress.errors import ConfigError
from vispress.methods import Debias, FastV, SparseVLM, TransPrune, VScan


def profile_of(*images, valid=None):
    """A profile of whole images, given as rows of attention."""
    profile = Profile()
    for row in images:
        everything = torch.ones(1, len(row), dtype=torch.bool)
        index = torch.arange(len(row))[None]
        profile.add(row[None], index, len(row), everything if valid is None else valid[None])
    return profile


def rising(slope, size, scale=1.0):
    return scale * torch.exp(slope * torch.arange(size, dtype=torch.float64) / size)


@pytest.mark.parametrize("slope", [-30.0, -1.0, 0.0, 0.815, 1.25, 2.381, 12.0])
def test_an_exponential_is_found_whatever_its_scale(slope):
    fit = fit_trend(profile_of(rising(slope, 576), rising(slope, 576, 0.003)))
    assert fit.slope == pytest.approx(slope, abs=1e-6)
    assert fit.images == 2
    assert fit.explained == pytest.approx(1.0 if slope else 0.0)


def test_images_of_unequal_size_have_one_trend():
    fit = fit_trend(profile_of(*(rising(1.5, size) for size in (576, 100, 2880, 1))))
    # an image's mean over few places is not quite that over many
    assert fit.slope == pytest.approx(1.5, abs=2e-3)


def test_every_image_counts_the_same():
    one, two = rising(2.0, 64), rising(0.0, 64)
    same = fit_trend(profile_of(one, two)).slope
    assert fit_trend(profile_of(one, 1000 * two)).slope == pytest.approx(same)
    assert 0 < same < 2


def test_the_released_curve_is_fitted_worse_by_an_exponential():
    t = torch.arange(576, dtype=torch.float64) / 575
    f = 1 + 1.7337386219 * t - 4.8264334464 * t**2 + 4.884125654 * t**3
    cubic = fit_trend(profile_of(f), "cubic")
    assert cubic.curve == pytest.approx((1.0, 1.7337386219, -4.8264334464, 4.884125654), rel=1e-6)
    assert cubic.explained == pytest.approx(1.0)
    exponential = fit_trend(profile_of(f))
    assert exponential.slope == pytest.approx(0.99, abs=5e-3)  # as worked out in the specification
    assert exponential.explained < 0.9


def test_padding_and_images_without_attention_are_left_out():
    row = rising(1.0, 64)
    row[:16], row[-16:] = 40.0, 50.0
    valid = torch.zeros(64, dtype=torch.bool)
    valid[16:-16] = True
    profile = profile_of(row, torch.full((64,), float("nan")), torch.zeros(64), valid=valid)
    assert profile.images == 1
    assert fit_trend(profile).slope == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(ConfigError, match="text behind the image"):
        fit_trend(profile_of(torch.zeros(8)))


def test_what_was_fitted_is_taken_out():
    content = torch.rand(576, generator=torch.Generator().manual_seed(0)).double() + 0.5
    rows = [content.roll(i) * rising(1.7, 576) for i in range(576)]  # content without a place
    fit = fit_trend(profile_of(*rows))
    assert fit.slope == pytest.approx(1.7, abs=0.01)
    tokens = only(query_attention=rows[0].float()[None, None, None])
    method = corrected(FastV(), fit)
    kept, best = method.plan(tokens, 50).keep[0], content.argsort(descending=True)[:50]
    assert len(set(kept.tolist()) & set(best.tolist())) >= 49


def test_what_is_measured_is_the_models_own_attention(subject):
    prompts = list(draw_prompts(None, [], 6, 0, subject))
    profile = measure(subject, prompts, FastV(layer=2), batch_size=4)
    assert profile.images == 6
    total = torch.zeros(144, dtype=torch.float64)
    subject.model.set_attn_implementation("eager")
    try:
        for prompt in prompts:
            inputs = subject.encode([prompt])
            with torch.no_grad():
                rows = subject.model(**inputs, output_attentions=True).attentions[1][0, :, -1]
            own = rows.mean(dim=0)[inputs["input_ids"][0] == subject.model.config.image_token_id]
            total += own.double() / own.double().mean()
    finally:
        subject.model.set_attn_implementation("sdpa")
    torch.testing.assert_close(profile.rows[144][0], total, rtol=1e-4, atol=1e-4)
    # nothing is left on the model
    assert "_vispress_attachment" not in subject.model.model.__dict__


@pytest.mark.parametrize("method", [SparseVLM(), TransPrune()], ids=lambda m: m.name)
def test_any_method_that_reads_attention_first_can_be_measured(subject, method):
    prompts = draw_prompts("attribute", [], 2, 0, subject)
    method = replace(method, layers=(1, 2, 3))
    assert measure(subject, prompts, method).rows[144].shape == (2, 144)


def test_a_method_that_does_not_is_refused(subject):
    prompts = draw_prompts("attribute", [], 1, 0, subject)
    with pytest.raises(ConfigError, match="vscan reads no attention of the LLM at its first stage"):
        measure(subject, prompts, VScan(keep_ratio=0.5))


def run_main(monkeypatch, *arguments):
    """Exit code of `vispress fit-debias ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["vispress", "fit-debias", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code or 0


@pytest.fixture
def pictures(tmp_path):
    """A folder of five pictures, two of them deeper down."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (60, 40 + i, 3), dtype=np.uint8)
        name = f"{i}.png" if i < 3 else f"more/{i}.JPG"
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.mark.parametrize("shape", ["exponential", "cubic"])
def test_the_file_is_what_compress_model_takes(
    monkeypatch,
    capsys,
    tmp_path,
    pictures,
    subject,
    checkpoint,
    shape,
):
    out = tmp_path / "debias.yaml"
    asked = ["--question", "what color ?", "--question", "how many ?", "--shape", shape]
    options = ["--model", checkpoint, "--out", out, "--layer", 2, "--num-tokens", 30]
    assert run_main(monkeypatch, "--data", pictures, *asked, *options) == 0
    assert "from 5 pictures" in capsys.readouterr().out
    assert out.read_text().startswith("# Fitted by vispress fit-debias on 5 pictures of")
    method = load_config(out)
    assert isinstance(method, Debias)
    assert method.inner == FastV(layer=2)
    assert method.num_tokens == 30
    assert (method.slope is None) == (shape == "cubic")
    prompt = next(draw_prompts("attribute", [], 1, 0, subject))
    compress_model(subject.model, config=out)
    try:
        subject.answer([prompt], 1)
        assert compression_report(subject.model).samples[0].images[0].num_kept == 30
    finally:
        remove_compression(subject.model)


def test_a_trend_that_explains_nothing_is_said_to(
    monkeypatch, capsys, tmp_path, pictures, checkpoint
):
    options = ["--data", pictures, "--question", "what ?", "--model", checkpoint]
    options += ["--out", tmp_path / "d.yaml", "--samples", 1]
    fits = {0.01: True, 0.5: False}
    for explained, warned in fits.items():
        fit = Fit(slope=0.1, curve=None, images=1, explained=explained)
        monkeypatch.setattr("vispress.analysis.trend.fit_trend", lambda *_, fit=fit: fit)
        assert run_main(monkeypatch, *options) == 0
        assert ("explains next to nothing" in capsys.readouterr().out) == warned


def test_lines_name_pictures_and_questions(monkeypatch, capsys, tmp_path, pictures, checkpoint):
    lines = [{"image": f"{i}.png", "question": "what color ?"} for i in range(3)]
    (data := pictures / "asked.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    out = tmp_path / "d.yaml"
    options = ["--data", data, "--model", checkpoint, "--out", out, "--samples", 2]
    assert (
        run_main(monkeypatch, *options, "--method", "pyramiddrop", "--set", "layers=[1,2,3]") == 0
    )
    assert "from 2 pictures" in capsys.readouterr().out
    assert load_config(out).keep_ratio is None  # the schedule is the budget


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "FOLDER"], "give --question for a folder"),
        (["--data", "EMPTY", "--question", "what"], "holds no pictures"),
        (["--data", "attribute", "--question", "what"], "--question is for a folder"),
        (["--data", "atribute"], "did you mean 'attribute'"),
        (["--data", "BAD.jsonl"], "line 2 needs 'image' and 'question'"),
        (["--data", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
        (["--shape", "linear"], "shape must be one of 'exponential', 'cubic', got 'linear'"),
        (["--dtype", "int4"], "dtype must be one of 'fp32', 'bf16', 'fp16', got 'int4'"),
        (["--method", "divprune"], "reads no attention of the LLM"),
        (["--method", "fastv", "--keep-ratio", "2"], "must be a number in (0, 1]"),
        (["--out", "FOLDER"], "cannot write"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_errors_say_what_is_wrong(
    monkeypatch,
    capsys,
    tmp_path,
    pictures,
    checkpoint,
    arguments,
    words,
):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "BAD.jsonl").write_text('{"image": "0.png", "question": "what"}\n{"image": 3}\n')
    places = {"FOLDER": pictures, "EMPTY": tmp_path / "EMPTY", "BAD.jsonl": tmp_path / "BAD.jsonl"}
    given = [places.get(word, word) for word in arguments]
    assert run_main(monkeypatch, "--samples", 1, "--model", checkpoint, *given) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_fits_are_written_with_six_digits():
    method = corrected(FastV(), Fit(slope=1.23456789, curve=None, explained=1.0, images=1))
    assert method.slope == 1.23457
