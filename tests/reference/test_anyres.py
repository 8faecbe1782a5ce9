"""Large pictures and the LLaVA-NeXT reference: drawn, cut, grafted, stored as a difference."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from vispress.errors import CheckpointError, ConfigError
from vispress.reference import load
from vispress.reference.evaluation.large_sets import held_out_large
from vispress.reference.model.checkpoint import read
from vispress.reference.model.llava_next import (
    DELTA,
    build_anyres_processor,
    export_delta,
    graft,
    read_delta,
    see_crops,
    visual_tokens,
)
from vispress.reference.train import anyres
from vispress.reference.train.loop import Budget
from vispress.reference.world.large import FIELDS, crops_of, cut, draw_large
from vispress.reference.world.scenes import draw_scene
from vispress.reference.world.words import LARGE_KINDS


@pytest.fixture(scope="module")
def parent():
    return load()[0]


@pytest.mark.parametrize("fields", FIELDS)
def test_a_large_picture_has_the_size_of_its_fields(fields):
    scene = draw_large(3, "test", 0, fields)
    assert scene.pixels.shape == (96 * fields[0], 96 * fields[1], 3)
    again = draw_large(3, "test", 0, fields)
    assert np.array_equal(scene.pixels, again.pixels)
    assert scene.items == again.items
    assert not np.array_equal(scene.pixels, draw_large(3, "train", 0, fields).pixels)
    for item in scene.items:  # its centre lies among the cells that show it
        assert int(item.y // 8) * 12 + int(item.x // 8) in item.patches


def test_its_background_goes_on_from_field_to_field():
    """Beside a seam pixels differ as they do elsewhere: by noise and what is drawn."""
    seams, steps = [], []
    for index in range(20):
        pixels = draw_large(0, "test", index, (1, 2)).pixels.astype(float)
        step = np.abs(np.diff(pixels, axis=1)).mean((0, 2))
        seams.append(step[95])
        steps.append(np.delete(step, 95).mean())
    assert np.mean(seams) < np.mean(steps)


@pytest.mark.parametrize("kind", LARGE_KINDS)
def test_held_out_questions_are_balanced_and_take_all_forms(kind):
    questions = held_out_large(kind, 24)
    assert [q.image.size for q in questions[:3]] == [(192, 192), (192, 96), (96, 192)]
    most = {"fine_print": 1, "small_object": 3, "across_crops": 6}[kind]
    assert max(Counter(q.question.answer for q in questions).values()) <= most
    for number, q in enumerate(questions):
        crops = crops_of(q.question, FIELDS[number % 3])
        assert len(crops) == (2 if kind == "across_crops" else 1)
        assert max(crops) < FIELDS[number % 3][0] * FIELDS[number % 3][1]
    with pytest.raises(ConfigError, match="kind must be one of"):
        held_out_large("reading", 1)
    with pytest.raises(ConfigError, match="n must be"):
        held_out_large(kind, 0)


@pytest.mark.parametrize("fields", [(1, 1), *FIELDS])
def test_training_sees_the_tokens_that_the_model_makes(parent, fields):
    model = graft(parent)
    small = draw_scene(0, "test", 0)
    scene = small if fields == (1, 1) else draw_large(0, "test", 0, fields)
    inputs = build_anyres_processor()(
        images=[Image.fromarray(scene.pixels)], text=["<image> ? :"], return_tensors="pt"
    )
    count = int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert count == visual_tokens(fields)
    with torch.inference_mode():
        theirs = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
        ours = see_crops(model, torch.from_numpy(cut(scene.pixels))[None], fields)
    torch.testing.assert_close(ours[0], theirs.pooler_output[0])


def changed(parent):
    """A graft whose decoder was moved."""
    model = graft(parent)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.model.language_model.layers.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
        model.model.image_newline += 0.5
    return model


def test_a_difference_is_stored_and_read(parent, tmp_path):
    model = changed(parent)
    export_delta(model, parent, tmp_path)
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) < 3e6
    again, processor = read(tmp_path)
    assert type(processor).__name__ == "LlavaNextProcessor"
    assert processor.image_processor.image_grid_pinpoints[0] == [96, 96]
    assert not again.training
    assert again.lm_head.weight is again.get_input_embeddings().weight
    ours = again.state_dict()
    for name, value in model.state_dict().items():
        # half a step of 127 to the largest difference, about 0.05
        torch.testing.assert_close(ours[name], value, atol=3e-4, rtol=1e-3)
    half = read_delta(tmp_path, parent, torch.float16)[0]
    assert {p.dtype for p in half.parameters()} == {torch.float16}


def test_what_would_not_be_stored_is_refused(parent, tmp_path):
    model = changed(parent)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.bias += 1
    with pytest.raises(ValueError, match=r"linear_1\.bias is the parent's"):
        export_delta(model, parent, tmp_path)


def test_a_damaged_difference_is_an_error(parent, tmp_path):
    export_delta(changed(parent), parent, tmp_path)
    whole = (tmp_path / DELTA).read_bytes()
    (tmp_path / DELTA).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        read(tmp_path)
    (tmp_path / DELTA).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        read(tmp_path)


def test_growing_moves_the_decoder_alone_and_goes_on(parent, tmp_path, monkeypatch):
    monkeypatch.setattr(anyres, "ROUND", ((1, 2), (1, 1)))
    monkeypatch.setattr(anyres, "_ROWS", {(1, 2): 1, (1, 1): 1})
    model = graft(parent)
    options = {"seed": 0, "device": torch.device("cpu")}
    anyres.train_anyres(model, tmp_path / "run", budget=Budget(images=2), **options)
    before, after = graft(parent).state_dict(), model.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert "model.image_newline" in moved
    assert any(name.endswith("layers.0.self_attn.q_proj.weight") for name in moved)
    assert all("language_model" in name or "newline" in name for name in moved)
    assert not any("embed_tokens" in name for name in moved)
    assert not model.training
    export_delta(model, parent, tmp_path / "delta")  # all that moved is stored
    again = graft(parent)
    anyres.train_anyres(again, tmp_path / "run", budget=Budget(images=2), **options)
    for name, value in again.state_dict().items():
        assert torch.equal(value, after[name]), name
