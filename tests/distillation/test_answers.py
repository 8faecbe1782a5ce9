"""Training by answers: what is encoded, what moves, and that few steps lower the loss."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vispress import cli, remove_compression
from vispress.adapters.base import find_adapter
from vispress.api import attachment_of
from vispress.bench.model.loaded_model import LoadedModel, load_named_model
from vispress.bench.tasks.task import Prompt
from vispress.distillation import answers
from vispress.distillation.answers import answer_loss, frozen, teach
from vispress.distillation.lessons import Pupil
from vispress.distillation.own_answers import IGNORED, with_answers
from vispress.distillation.scenes import training_prompts
from vispress.errors import ConfigError
from vispress.methods import CoViPAL, VisionSelector
from vispress.methods.base import Compressor
from vispress.runtime.modules import make_modules
from vispress.weights import read_saved

pytestmark = pytest.mark.slow
OWN = "model.vispress_modules.0"


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_named_model("reference", "cpu", "fp32")


def test_answers_stand_behind_prompts_and_are_labelled(loaded: LoadedModel) -> None:
    prompts = list(training_prompts(6))
    inputs, tokenizer = with_answers(loaded, prompts), loaded.processor.tokenizer
    assert {value.shape for name, value in inputs.items() if name != "pixel_values"} == {
        inputs["input_ids"].shape
    }
    for row, prompt in enumerate(prompts):
        own = inputs["labels"][row]
        words = inputs["input_ids"][row][own != IGNORED].tolist()
        assert words[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(words[:-1]) == prompt.answer
        assert torch.equal(own[own != IGNORED], inputs["input_ids"][row][own != IGNORED])
    alone = sum(answer_loss(loaded, [prompt], 1) for prompt in prompts[:1])
    assert alone < 0.5, "the model knows its own scenes"
    with pytest.raises(ConfigError, match="training by answers needs them"):
        with_answers(loaded, [replace(prompts[0], answer="")])


METHODS: list[Compressor] = [
    CoViPAL(layers=(1,), num_tokens=24, width=32, heads=2),
    VisionSelector(num_tokens=24),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_steps_move_the_method_alone_and_progress_is_set_back(
    loaded: LoadedModel, method: Compressor
) -> None:
    before = {name: p.detach().clone() for name, p in loaded.model.named_parameters()}
    told: list[tuple[str, int]] = []

    def begin(what: str, total: int) -> object:
        return lambda by: told.append((what, by))

    prompts: Iterator = training_prompts(24, seed=3)
    pupil = Pupil(loaded, method, prompts, steps=3, lr=1e-2, batch_size=4, begin=begin)  # type: ignore[arg-type]
    curve = teach(pupil)
    try:
        assert len(curve.loss) == 3
        assert told == [("training", 1)] * 3
        assert curve.held_out[0] != curve.held_out[1]
        now = dict(loaded.model.named_parameters())
        assert all(torch.equal(now[name], value) for name, value in before.items())
        assert all(p.requires_grad for p in now.values())
        assert not loaded.model.training
        assert attachment_of(loaded.model).plan.methods == (method,)
        begun = make_modules(find_adapter(loaded.model), [method])["0"]
        moved = [not torch.equal(now[f"{OWN}.{n}"], p) for n, p in begun.named_parameters()]
        assert sum(moved) > len(moved) / 2
    finally:
        remove_compression(loaded.model)


def test_one_prompt_in_ten_is_never_learned_from(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, learned = list(training_prompts(20, seed=4)), []
    loss = answers._loss

    def noted(own: LoadedModel, batch: Sequence[Prompt]) -> torch.Tensor:
        learned.extend(batch)
        return loss(own, batch)

    monkeypatch.setattr(answers, "_loss", noted)
    try:
        teach(Pupil(loaded, METHODS[1], prompts, steps=2, lr=1e-3, batch_size=9))
    finally:
        remove_compression(loaded.model)
    kept = [number for number, one in enumerate(prompts) if any(one is x for x in learned)]
    assert kept == [number for number in range(20) if number not in (0, 10)]


def test_what_was_frozen_before_stays_frozen(loaded: LoadedModel) -> None:
    first = next(loaded.model.parameters())
    first.requires_grad_(False)
    with frozen(loaded.model, torch.nn.Linear(1, 1)):
        assert not any(p.requires_grad for p in loaded.model.parameters())
    assert not first.requires_grad
    first.requires_grad_(True)
    assert all(p.requires_grad for p in loaded.model.parameters())


def test_too_few_prompts_are_refused(loaded: LoadedModel) -> None:
    pupil = Pupil(loaded, METHODS[1], training_prompts(19), steps=1, lr=1e-3)
    with pytest.raises(ConfigError, match="at least 20 prompts, got 19"):
        teach(pupil)


def test_where_every_token_stays_there_is_nothing_to_learn(loaded: LoadedModel) -> None:
    pupil = Pupil(loaded, VisionSelector(keep_ratio=1.0, weight=0.0), training_prompts(20), 2, 1e-3)
    try:
        with pytest.raises(ConfigError, match="no gradient reaches the parameters of vision_sel"):
            teach(pupil)
    finally:
        remove_compression(loaded.model)


def test_stages_follow_one_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By attention, then from there by answers; a folder of other sizes is refused by name."""

    def command(*words: str) -> int:
        line = ["vispress", "train-compressor", "--method", "covipal", *words]
        monkeypatch.setattr(sys, "argv", line)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    small = ["--set", "layers=[1]", "--set", "num_tokens=24", "--set", "heads=2"]
    small += ["--steps", "2", "--samples", "24"]
    first, second = (str(tmp_path / name) for name in ("first", "second"))
    assert command(*small, "--set", "width=32", "--out", first) == 0
    answers = ["--stage", "answers", "--start-from", first, "--out", second]
    assert command(*small, "--set", "width=32", *answers) == 0
    cards = [read_saved(Path(folder)).card["data"]["stage"] for folder in (first, second)]
    assert cards == ["attention", "answers"]
    assert command(*small, "--set", "width=16", *answers) == 2
