"""What training loops ask: losses of methods, groups, progress, a teacher."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from tests.laws.cases import inputs_of, logits_of, model_of
from tests.laws.test_law10_training import backward, checkpointing, loss_of, training
from tests.penalised import Penalised
from tests.tiny import Image, Sample, Text, build, make_inputs
from vispress import (
    compress_model,
    compressed,
    compression_loss,
    compression_report,
    parameter_groups,
    remove_compression,
    save_compression,
    set_progress,
    update_compression,
)
from vispress.errors import CompressionStateError, ConfigError
from vispress.methods import DivPrune, PMoD
from vispress.training import answer_divergence
from vispress.types import TokenPlan, VisualTokens

# --- losses


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_losses_are_a_mean_over_images_and_a_sum_over_placements(family: str) -> None:
    """However images fall into buckets: on Qwen they have two sizes."""
    model, inputs = model_of(family), inputs_of(family)
    samples = [
        Sample([Text(5), Image(4, 4), Text(7)]),
        Sample([Text(2), Image(4, 6), Text(3), Image(6, 4), Text(4)]),
    ]
    with training(model), compressed(model, Penalised()):
        with compression_loss(model) as extra:
            assert float(extra().detach()) == 0.0
            loss_of(model, inputs)
            together = extra.by_name
            assert float(extra().detach()) == pytest.approx(sum(together.values()))
        alone = []
        for only in range(2):
            with compression_loss(model) as extra:
                loss_of(model, make_inputs(family, samples, only=only))
                alone.append(extra.by_name["ones"])
        assert together["ones"] == pytest.approx(2.0)
        assert alone == pytest.approx([2.0, 2.0])
        with compression_loss(model) as extra:  # two forwards, and a backward of both
            (loss_of(model, inputs) + loss_of(model, inputs)).backward()
            assert extra.by_name["size"] == pytest.approx(2 * together["size"])
        model.zero_grad()
        loss_of(model, inputs)  # outside: nothing is kept
        assert extra.by_name["size"] == pytest.approx(2 * together["size"])


def test_losses_reach_the_parameters_and_checkpoints_count_them_once() -> None:
    model, inputs = build("llava"), inputs_of("llava")
    with training(model), compressed(model, Penalised()):
        found = []
        for reentrant in (None, True, False):
            with compression_loss(model) as extra:
                if reentrant is None:
                    loss = loss_of(model, inputs) + extra()
                    found.append((extra.by_name, backward(model, loss)))
                    continue
                with checkpointing(model, reentrant=reentrant):
                    loss = loss_of(model, inputs) + extra()
                    found.append((extra.by_name, backward(model, loss)))
        (name,) = (name for name in found[0][1] if "vispress_modules" in name)
        assert found[0][1][name].abs().sum() > 0
        for losses, gradients in found[1:]:
            assert losses == pytest.approx(found[0][0])
            torch.testing.assert_close(gradients[name], found[0][1][name])


def test_a_batch_without_images_has_gradients_of_zero() -> None:
    model = build("llava")
    inputs = make_inputs("llava", [Sample([Text(6)])])
    with training(model), compressed(model, PMoD()):
        with compression_loss(model) as extra:
            (loss_of(model, inputs) + extra()).backward()
        own = [p for n, p in model.named_parameters() if "vispress_modules" in n]
        assert len(own) == 8
        assert all(p.grad is not None and not p.grad.any() for p in own)
    with pytest.raises(CompressionStateError, match="not compressed"), compression_loss(model):
        pass


def test_losses_of_two_models_are_apart() -> None:
    first, second = model_of("llava"), model_of("llava_next")
    with compressed(first, Penalised()), compressed(second, Penalised(layers=(2,))):
        with compression_loss(first) as one, compression_loss(second) as other:
            logits_of(first, inputs_of("llava"))
            logits_of(second, inputs_of("llava_next"))
        assert one.by_name["ones"] == pytest.approx(2.0)
        assert other.by_name["ones"] == pytest.approx(1.0)


def test_a_loss_that_is_not_one_an_image_is_an_error() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Scalar(Penalised):
        def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
            return replace(super().plan(tokens, num_keep), losses={"size": torch.ones(())})

    model = model_of("llava")
    with compressed(model, Scalar()), pytest.raises(ValueError, match=r"loss size has shape \(\)"):
        logits_of(model, inputs_of("llava"))


# --- groups


def test_groups_part_the_models_parameters_from_the_methods() -> None:
    model = compress_model(build("llava"), PMoD())
    own = {id(p) for n, p in model.named_parameters() if "vispress_modules" in n}
    rest, methods = parameter_groups(model, lr=1e-5, modules_lr=2e-4)
    assert (rest["lr"], methods["lr"]) == (1e-5, 2e-4)
    assert {id(p) for p in methods["params"]} == own
    assert len(rest["params"]) + len(own) == len(list(model.parameters()))
    torch.optim.AdamW([rest, methods])
    for p in model.parameters():
        p.requires_grad_(id(p) in own)
    (only,) = parameter_groups(model, lr=1e-5, modules_lr=2e-4)
    assert only["lr"] == 2e-4
    for bad in ({"lr": 0.0, "modules_lr": 1.0}, {"lr": 1.0, "modules_lr": "fast"}):
        with pytest.raises(ConfigError, match="must be a number above 0"):
            parameter_groups(model, **bad)  # type: ignore[arg-type]
    remove_compression(model)
    with pytest.raises(CompressionStateError, match="not compressed"):
        parameter_groups(model, lr=1.0, modules_lr=1.0)


# --- progress


def test_progress_moves_settings_and_keeps_parameters(tmp_path: Path) -> None:
    model, inputs = (
        compress_model(build("llava"), [DivPrune(keep_ratio=0.5), Penalised()]),
        inputs_of("llava"),
    )
    own = {n: id(p) for n, p in model.named_parameters() if "vispress_modules" in n}

    def kept() -> int:
        logits_of(model, inputs)
        return compression_report(model).samples[0].images[0].num_kept

    assert kept() == 2  # as it was compressed: an eighth of 18
    for progress, count in ((0.0, 9), (0.5, 6), (1.0, 2), (0.25, 7)):
        set_progress(model, progress)
        assert kept() == count
    assert {n: id(p) for n, p in model.named_parameters() if "vispress_modules" in n} == own
    save_compression(model, tmp_path)
    assert "keep_ratio: 0.25" in (tmp_path / "compressor.yaml").read_text()
    for bad in (-0.1, 1.5, "half", True, float("nan")):
        with pytest.raises(ConfigError, match=r"progress must be a number in \[0, 1\]"):
            set_progress(model, bad)  # type: ignore[arg-type]


def test_progress_of_methods_without_a_schedule_changes_nothing() -> None:
    model = compress_model(build("llava"), PMoD())
    from vispress.api import attachment_of

    plan = attachment_of(model).plan
    for step in range(4):
        set_progress(model, step / 3)
    assert attachment_of(model).plan is plan
    update_compression(model, scale=0.1)
    assert attachment_of(model).plan is not plan


# --- a teacher


def test_the_divergence_of_answers_by_hand() -> None:
    """Two answer tokens, behind prompts of one and of three; the teacher knows a word less."""
    labels = torch.tensor([[-100, 1, 0, -100]])
    shown = torch.tensor([[-100, -100, -100, 1, 0]])
    own, theirs = torch.zeros(1, 4, 3), torch.zeros(1, 5, 2)
    own[0, 0, :2] = torch.tensor([0.75, 0.25]).log()
    own[0, :, 2] = 5.0  # the word that the teacher lacks
    theirs[0, 3] = torch.tensor([0.9, 0.1]).log()
    own.requires_grad_()
    theirs.requires_grad_()
    found = answer_divergence(own, labels, theirs, shown)
    first = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    second = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert float(found.detach()) == pytest.approx((first + second) / 2, rel=1e-5)
    found.backward()
    assert theirs.grad is None
    assert own.grad is not None
    assert own.grad[0, :, 0].ne(0).tolist() == [True, True, False, False]
    softer = answer_divergence(own, labels, theirs, shown, temperature=2.0)
    a, b = (math.sqrt(x) for x in (0.75, 0.25))
    c, d = (math.sqrt(x) / (math.sqrt(0.9) + math.sqrt(0.1)) for x in (0.9, 0.1))
    first = 0.5 * math.log(0.5 * (a + b) / a) + 0.5 * math.log(0.5 * (a + b) / b)
    second = c * math.log(2 * c) + d * math.log(2 * d)
    assert float(softer.detach()) == pytest.approx(4 * (first + second) / 2, rel=1e-5)


def test_a_teacher_of_other_answers_is_refused() -> None:
    logits, labels = torch.zeros(1, 3, 4), torch.tensor([[-100, 2, 3]])
    for others in ([[-100, 2, -100]], [[-100, 2, 1]]):
        with pytest.raises(ConfigError, match=r"must see the same answers, got 2 answer tokens"):
            answer_divergence(logits, labels, logits, torch.tensor(others))
    with pytest.raises(ConfigError, match="no label is an answer's"):
        answer_divergence(logits, torch.full((1, 3), -100), logits)
    with pytest.raises(ConfigError, match="temperature"):
        answer_divergence(logits, labels, logits, temperature=0.0)
