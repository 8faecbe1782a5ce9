"""Training: leaves what it promises, does not repeat itself, refuses damaged or foreign state."""

import json

import pytest

from vispress.errors import CheckpointError, ConfigError
from vispress.reference import train_reference

TINY = {
    "vision_batch": 4,
    "language_batch": 4,
    "episodes_batch": 4,
    "workers": 0,
    "questions": 2,
    "check_questions": 0,
    "config": {"vision_layers": 2, "text_layers": 1},
}
SHORT = {"vision_images": 16, "language_images": 16, "episodes_images": 16}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, one_iteration):
    out = tmp_path_factory.mktemp("run")
    scores = train_reference(out, **SHORT, **TINY)
    return out, scores


@pytest.mark.slow
def test_a_run_leaves_checkpoint_card_curves_and_accuracy(trained):
    out, scores = trained
    assert len(scores) == 14
    assert all(0 <= score <= 1 for score in scores.values())
    assert json.loads((out / "accuracy.json").read_text())["accuracy"] == scores
    card = (out / "checkpoint" / "MODEL_CARD.md").read_text()
    assert "load_digits" in card
    assert card.count("16 images") == 2
    assert "Episodes**, 18 images" in card  # whole steps: 4 + 3 + 3 + 4 + 4
    assert (out / "curves.png").stat().st_size > 1000


@pytest.mark.slow
def test_finished_stages_are_not_trained_again(trained):
    out, scores = trained
    before = (out / "checkpoint" / "model.safetensors").read_bytes()
    assert train_reference(out, **SHORT, **TINY) == scores
    assert (out / "checkpoint" / "model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_damaged_state_is_named(trained, tmp_path):
    state = tmp_path / "vision" / "state.safetensors"
    state.parent.mkdir()
    whole = (trained[0] / "vision" / "state.safetensors").read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"vision.state\.safetensors"):
        train_reference(tmp_path, **SHORT, **TINY)


@pytest.mark.slow
def test_state_of_other_settings_is_refused(trained):
    with pytest.raises(ConfigError, match="seed"):
        train_reference(trained[0], seed=1, **SHORT, **TINY)


def test_processes_must_divide_the_batches(tmp_path):
    with pytest.raises(ValueError, match="processes"):
        train_reference(tmp_path, processes=3)


@pytest.mark.full
def test_episodes_start_from_a_checkpoint_and_go_on_where_they_stopped(trained, tmp_path):
    start = trained[0] / "checkpoint"
    short = {"episodes_images": 6, "start": start}
    train_reference(tmp_path, **short, **TINY)
    assert not (tmp_path / "vision").exists()
    log = tmp_path / "episodes" / "log.jsonl"
    before = log.read_text()
    train_reference(tmp_path, **(short | {"episodes_images": 12}), **TINY)
    assert log.read_text().startswith(before)
    assert json.loads(log.read_text().splitlines()[-1])["images"] >= 12


@pytest.mark.full
@pytest.mark.parametrize("stages", ["the last", "all"])
def test_two_processes_train_together(trained, tmp_path, stages):
    start = {"start": trained[0] / "checkpoint", "episodes_images": 6}
    chosen = start if stages == "the last" else SHORT
    scores = train_reference(tmp_path, **chosen, processes=2, **TINY)
    assert len(scores) == 14
