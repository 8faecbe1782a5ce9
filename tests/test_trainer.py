"""transformers' Trainer as it is, and the library's: both train methods beside the model."""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from tests.penalised import Penalised
from tests.tiny import Image, Sample, Text, build, make_inputs
from vispress import (
    CompressionCallback,
    compress_model,
    compression_loss,
    parameter_groups,
    remove_compression,
)
from vispress.errors import CompressionStateError, ConfigError
from vispress.methods import GammaMoD, PMoD
from vispress.trainer import CompressionTrainer
from vispress.training import answer_divergence
from vispress.types import Signal, TokenPlan, VisualTokens


class Questions(torch.utils.data.Dataset[dict[str, Tensor]]):
    """A few prompts of one picture, with answers of two tokens."""

    def __init__(self, count: int = 8) -> None:
        sample = Sample([Text(5), Image(4, 4), Text(7)])
        self.rows = [
            make_inputs("llava", [sample], seed=seed, dtype=torch.float32) for seed in range(count)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        row = {name: value[0] for name, value in self.rows[number].items()}
        labels = row["input_ids"].clone()
        labels[:-2] = -100
        return row | {"labels": labels}


def trainer(folder: Path, model: Any, resume_from: Path | None = None, **options: Any) -> Trainer:
    """Four steps of two questions, on the host."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-3, "use_cpu": True,
        "report_to": [], "save_steps": 2, "logging_steps": 1, "remove_unused_columns": False,
        "disable_tqdm": True, "seed": 0,
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(folder), **(settings | options))
    callbacks = [CompressionCallback(resume_from)]
    questions = {"train_dataset": Questions(), "eval_dataset": Questions(2)}
    return Trainer(model, arguments, callbacks=callbacks, **questions)


def drawn(model: Any) -> dict[str, Tensor]:
    """Parameters of methods, as they are now."""
    own = (item for item in model.named_parameters() if "vispress_modules" in item[0])
    return {name: p.detach().clone() for name, p in own}


def trained_model() -> Any:
    return compress_model(build("llava", dtype=torch.float32), PMoD())


@pytest.mark.slow
def test_a_plain_trainer_trains_both(tmp_path: Path) -> None:
    model = trained_model()
    before, weight = drawn(model), model.lm_head.weight.detach().clone()
    trainer(tmp_path, model).train()
    assert not torch.equal(model.lm_head.weight, weight)
    moved = {name for name, value in drawn(model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if ".5." not in name}


def frozen_model() -> Any:
    """Routers alone are trained: a trainer that resumes LLaVA does not find its weights' names."""
    model = build("llava", dtype=torch.float32).requires_grad_(False)
    return compress_model(model, PMoD())


@pytest.mark.slow
def test_a_plain_trainer_saves_and_resumes(tmp_path: Path) -> None:
    model = frozen_model()
    before = drawn(model)
    trainer(tmp_path / "one", model).train()
    after = drawn(model)
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    checkpoint = tmp_path / "one" / "checkpoint-2"
    assert not any("vispress" in name for name in load_file(checkpoint / "model.safetensors"))
    assert (checkpoint / "compressor" / "modules.safetensors").exists()
    for folder, resume_from in (("one", None), ("two", checkpoint)):
        again = frozen_model()
        resumed = trainer(tmp_path / folder, again, resume_from)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        for name, value in drawn(again).items():
            torch.testing.assert_close(value, after[name], rtol=0, atol=0)
    with pytest.raises(ConfigError, match=r"cannot read .*compressor/vispress\.json"):
        trainer(tmp_path / "three", frozen_model()).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.slow
def test_the_best_checkpoint_brings_its_compressor(tmp_path: Path) -> None:
    model = trained_model()
    run = trainer(
        tmp_path, model, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    run.train()
    assert run.state.best_model_checkpoint is not None
    best = Path(run.state.best_model_checkpoint)
    saved = load_file(best / "compressor" / "modules.safetensors")
    found = {name.split("vispress_modules.")[1]: value for name, value in drawn(model).items()}
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], value) for name, value in saved.items())
    card = json.loads((best / "compressor" / "vispress.json").read_text())
    assert card["methods"] == ["pmod"]


@pytest.mark.slow(cases=2)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_of_the_library_adds_losses_and_logs_what_was_kept(
    tmp_path: Path, accumulation: int
) -> None:
    """As a loop by hand does: equal weights behind two updates."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 1e-3, "use_cpu": True,
        "report_to": [], "logging_steps": 1, "remove_unused_columns": False, "save_strategy": "no",
        "disable_tqdm": True, "optim": "sgd", "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0, "gradient_accumulation_steps": accumulation,
    }  # fmt: skip
    questions = Questions(4 * accumulation)
    arguments = TrainingArguments(output_dir=str(tmp_path), **settings)
    method = GammaMoD(loss_weight=30.0)
    model = compress_model(build("llava", dtype=torch.float32), method)
    run = CompressionTrainer(model, arguments, train_dataset=questions, modules_lr=0.1)
    run.get_train_dataloader = lambda: in_order(questions, run.accelerator)  # type: ignore[method-assign]
    run.train()
    logs = [entry for entry in run.state.log_history if "loss/gamma_mod" in entry]
    assert len(logs) == 2
    assert all(0 < entry["mean_keep_ratio"] < 1 for entry in logs)
    assert {group["lr"] for group in run.optimizer.param_groups} == {1e-3, 0.1}
    again = compress_model(build("llava", dtype=torch.float32), method)
    again.train()
    sgd = torch.optim.SGD(parameter_groups(again, lr=1e-3, modules_lr=0.1))
    batches = [torch.utils.data.default_collate([questions[i], questions[i + 1]])
               for i in range(0, len(questions), 2)]  # fmt: skip
    for start in range(0, len(batches), accumulation):
        sgd.zero_grad()
        for batch in batches[start : start + accumulation]:
            with compression_loss(again) as extra:
                loss = again(**batch, use_cache=False).loss
                ((loss + extra()) / accumulation).backward()
        sgd.step()
    for name, value in drawn(again).items():
        torch.testing.assert_close(drawn(model)[name], value, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.lm_head.weight, again.lm_head.weight, rtol=1e-4, atol=1e-6)


def reading(seen: set[int]) -> Penalised:
    """Notes how much text it was shown."""

    class Reading(Penalised):
        reads: ClassVar[frozenset[Signal]] = frozenset({Signal.TEXT_STATES})

        def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
            assert tokens.text_states is not None
            seen.add(tokens.text_states.shape[1])
            return super().plan(tokens, num_keep)

    return Reading()


@pytest.mark.slow(cases=2)
@pytest.mark.parametrize("alone", ["compute_loss_func", "label_smoothing_factor"])
def test_a_loss_outside_of_the_model_does_not_show_answers_to_methods(
    tmp_path: Path, alone: str
) -> None:
    """The trainer takes labels off such batches, and a prompt would end behind its answer."""
    seen: set[int] = set()

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        flat = outputs.logits[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(flat, labels[:, 1:].flatten())

    settings: dict[str, Any] = {"max_steps": 1, "report_to": [], "use_cpu": True}
    settings |= {"save_strategy": "no", "remove_unused_columns": False, "disable_tqdm": True}
    named: dict[str, Any] = {"compute_loss_func": loss} if alone == "compute_loss_func" else {}
    settings |= {} if named else {alone: 0.1}
    arguments = TrainingArguments(output_dir=str(tmp_path), **settings)
    model = compress_model(build("llava", dtype=torch.float32), reading(seen))
    questions = {"train_dataset": Questions(), "eval_dataset": Questions(2)}
    run = CompressionTrainer(model, arguments, **questions, **named)
    run.train()
    run.evaluate()
    assert seen == {5}, "of 7 tokens behind the image, 2 are the answer"


class Fusing(Trainer):
    """Gives the model a forward that hands its base no labels, as TRL's trainers do."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        before = self.model.forward

        def fused(*_: Any, labels: Tensor | None = None, **given: Any) -> Any:
            if labels is None:
                return before(**given)
            hidden = self.model.model(**given).last_hidden_state[:, :-1]
            logits = self.model.lm_head(hidden).flatten(0, 1)
            return {"loss": nn.functional.cross_entropy(logits, labels[:, 1:].flatten())}

        self.model.forward = fused


class FusingBoth(CompressionTrainer, Fusing):
    """Both."""


@pytest.mark.slow(cases=3)
@pytest.mark.parametrize("by", ["callback", "trainer", "neither"])
def test_a_forward_that_a_trainer_puts_in_place_hides_no_labels(tmp_path: Path, by: str) -> None:
    seen: set[int] = set()
    settings: dict[str, Any] = {"max_steps": 1, "report_to": [], "use_cpu": True}
    settings |= {"save_strategy": "no", "remove_unused_columns": False, "disable_tqdm": True}
    arguments = TrainingArguments(output_dir=str(tmp_path), **settings)
    model = compress_model(build("llava", dtype=torch.float32), reading(seen))
    row = {name: value[None] for name, value in Questions(1)[0].items()}
    questions = {"train_dataset": Questions(), "eval_dataset": Questions(2)}
    if by == "trainer":
        run: Any = FusingBoth(model, arguments, **questions)
        run.evaluate()
    else:
        callbacks = [CompressionCallback()] if by == "callback" else []
        run = Fusing(model, arguments, callbacks=callbacks, **questions)
    if by == "neither":
        with pytest.raises(CompressionStateError, match=r"replaced after.*CompressionCallback"):
            run.train()
        return
    run.train()
    model(**row)
    assert seen == {5}, "of 7 tokens behind the image, 2 are the answer"
    seen.clear()
    del row["labels"]
    model(**row, prompt_lengths=[row["input_ids"].shape[1] - 3])  # once, not by a patch beneath too
    assert seen == {4}
    remove_compression(model)
    assert model.forward.__name__ == "fused"
    model(**row)
    assert seen == {4}
    compress_model(model, reading(seen))
    model(**row)
    assert seen == {4, 7}


def in_order(questions: Questions, accelerator: Any) -> Any:
    return accelerator.prepare(torch.utils.data.DataLoader(questions, batch_size=2))


def test_the_trainer_of_the_library_wants_a_compressed_model(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(CompressionStateError, match="not compressed"):
        CompressionTrainer(build("llava"), arguments)
    with pytest.raises(ConfigError, match="modules_lr must be"):
        CompressionTrainer(trained_model(), arguments, modules_lr=0.0)
    own = CompressionCallback()
    run = CompressionTrainer(trained_model(), arguments, callbacks=[own])
    found = [c for c in run.callback_handler.callbacks if isinstance(c, CompressionCallback)]
    assert found == [own]


@pytest.mark.slow
def test_groups_of_a_trainer_have_their_rates(tmp_path: Path) -> None:
    model = trained_model()
    optimiser = torch.optim.SGD(parameter_groups(model, lr=1e-12, modules_lr=1.0))
    before = drawn(model)
    weight = model.lm_head.weight.detach().clone()
    run = trainer(tmp_path, model, save_strategy="no")
    run.optimizer = optimiser
    run.train()
    name = next(name for name in before if name.endswith("0.2.weight"))
    assert (drawn(model)[name] - before[name]).abs().max() > 1e-4
    assert (model.lm_head.weight - weight).abs().max() < 1e-6


@pytest.mark.slow
def test_a_trainer_adds_the_divergence_from_its_teacher(tmp_path: Path) -> None:
    """As a loop by hand; the teacher does not hear VoCo tokens, which mean nothing to it."""
    model, teacher = (build("llava", dtype=torch.float32) for _ in range(2))
    voco = model.get_input_embeddings().num_embeddings - 1
    questions = Questions(4)
    for row in questions.rows:
        row["input_ids"][0, -6:-4] = voco
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 1e-3, "use_cpu": True,
        "report_to": [], "logging_steps": 1, "remove_unused_columns": False, "save_strategy": "no",
        "disable_tqdm": True, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(tmp_path), **settings)
    compress_model(model, method="voco")
    with torch.no_grad():
        teacher.get_input_embeddings().weight[voco] += 100.0
    given = {"train_dataset": questions, "teacher": teacher, "teacher_weight": 3.0}
    run = CompressionTrainer(model, arguments, **given)
    run.get_train_dataloader = lambda: in_order(questions, run.accelerator)  # type: ignore[method-assign]
    run.train()
    logged = [e["loss/divergence"] for e in run.state.log_history if "loss/divergence" in e]
    again, plain = (build("llava", dtype=torch.float32) for _ in range(2))
    compress_model(again, method="voco").train()
    sgd, apart = torch.optim.SGD(again.parameters(), lr=1e-3), []
    for start in (0, 2):
        batch = torch.utils.data.default_collate([questions[start], questions[start + 1]])
        heard = batch | {"attention_mask": (batch["input_ids"] != voco).long()}
        with torch.no_grad():
            told = plain(**heard).logits
        out = again(**batch, use_cache=False)
        apart.append(answer_divergence(out.logits, batch["labels"], told))
        sgd.zero_grad()
        (out.loss + 3.0 * apart[-1]).backward()
        sgd.step()
    assert logged == pytest.approx([float(one.detach()) for one in apart], rel=1e-4)
    torch.testing.assert_close(model.lm_head.weight, again.lm_head.weight, rtol=1e-4, atol=1e-6)
    with pytest.raises(ConfigError, match="teacher must be uncompressed"):
        CompressionTrainer(model, arguments, teacher=again)
    with pytest.raises(ConfigError, match="teacher_weight"):
        CompressionTrainer(model, arguments, teacher=plain, teacher_weight=-1.0)
