"""Training: it learns, resumes to the same weights, and refuses damaged or foreign state."""

import json

import pytest
import torch

from vispress.errors import CheckpointError, ConfigError
from vispress.reference import train_reference
from vispress.reference.checkpoint import read
from vispress.reference.loop import Budget

TINY = {
    "vision_batch": 4,
    "language_batch": 4,
    "workers": 0,
    "questions": 2,
    "check_questions": 0,
    "config": {"vision_layers": 2, "text_layers": 1},
}


def weights(folder):
    return dict(read(folder / "checkpoint")[0].named_parameters())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    scores = train_reference(out, vision_images=16, language_images=16, **TINY)
    return out, scores


def test_a_run_leaves_checkpoint_card_curves_and_accuracy(trained):
    out, scores = trained
    assert len(scores) == 9
    assert all(0 <= score <= 1 for score in scores.values())
    assert json.loads((out / "accuracy.json").read_text())["accuracy"] == scores
    card = (out / "checkpoint" / "MODEL_CARD.md").read_text()
    assert "load_digits" in card
    assert "16 images" in card
    assert (out / "curves.png").stat().st_size > 1000


def test_a_resumed_run_ends_at_the_same_weights(trained, tmp_path):
    whole, _ = trained
    train_reference(tmp_path, vision_images=16, language_images=8, **TINY)
    # the schedule follows the budget, so only the vision stage can be compared after a stop
    first = weights(tmp_path)
    train_reference(tmp_path, vision_images=16, language_images=8, **TINY)
    again = weights(tmp_path)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert first.keys() == weights(whole).keys()


def test_damaged_state_is_named(trained, tmp_path):
    state = tmp_path / "vision" / "state.safetensors"
    state.parent.mkdir()
    whole = (trained[0] / "vision" / "state.safetensors").read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"vision.state\.safetensors"):
        train_reference(tmp_path, vision_images=16, language_images=16, **TINY)


def test_state_of_other_settings_is_refused(trained):
    with pytest.raises(ConfigError, match="seed"):
        train_reference(trained[0], seed=1, vision_images=16, language_images=16, **TINY)


@pytest.mark.parametrize("bad", [{"minutes": 0}, {"images": -1}, {}])
def test_an_empty_budget_is_refused(bad):
    with pytest.raises(ValueError, match="positive"):
        Budget(**bad)


def test_processes_must_divide_the_batches(tmp_path):
    with pytest.raises(ValueError, match="processes"):
        train_reference(tmp_path, processes=3)


@pytest.mark.slow
def test_two_processes_train_together(tmp_path):
    scores = train_reference(tmp_path, vision_images=8, language_images=8, processes=2, **TINY)
    assert len(scores) == 9
