"""The training loop: budgets, the learning-rate curve, and resuming without a trace."""

import json

import pytest
import torch
from torch import nn

from vispress.errors import CheckpointError, ConfigError
from vispress.reference.train.loop import Budget, Run, learning_rate, read_state
from vispress.reference.train.optim import make_optimizer


def make_run(folder, **settings):
    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    optimizer = make_optimizer({"layer": layer}, lr=0.1)
    budget = Budget(images=8)
    run = Run(
        folder, {"layer": layer}, optimizer, budget=budget, peak=0.1, floor=0.1, settings=settings
    )
    return run, layer


def advance(run, layer, steps):
    for _ in range(steps):
        x = torch.full((2, 6), float(run.at.step))
        run.advance((layer(x) - 1).square().mean(), 1)
        run.log({"loss": 0.5})


def test_a_run_that_was_cut_off_ends_where_an_uncut_one_does(tmp_path):
    whole, layer = make_run(tmp_path / "whole")
    advance(whole, layer, 8)
    assert whole.progress == 1
    cut, other = make_run(tmp_path / "cut")
    advance(cut, other, 3)
    cut.save()
    advance(cut, other, 2)  # lost: never saved
    resumed, again = make_run(tmp_path / "cut")
    assert resumed.resume()
    assert resumed.at.step == 3
    advance(resumed, again, 5)
    assert torch.equal(again.weight, layer.weight)
    assert torch.equal(again.bias, layer.bias)
    lines = (tmp_path / "cut" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 9))


def test_nothing_to_resume_is_no_error(tmp_path):
    assert not make_run(tmp_path)[0].resume()


def test_other_settings_are_refused(tmp_path):
    make_run(tmp_path, seed=0)[0].save()
    with pytest.raises(ConfigError, match="'seed': 0"):
        make_run(tmp_path, seed=1)[0].resume()


@pytest.mark.parametrize(
    "content", [b"", b"not safetensors at all", b"\xff" * 64], ids=["empty", "text", "noise"]
)
def test_damaged_state_is_a_checkpoint_error(tmp_path, content):
    path = tmp_path / "state.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"state\.safetensors"):
        read_state(path)


def test_the_learning_rate_warms_up_and_ends_at_its_floor():
    rates = [learning_rate(p, peak=1.0, floor=0.1) for p in (0.0, 0.01, 0.02, 0.5, 1.0)]
    assert rates[0] < rates[1] < rates[2] == 1.0
    assert rates[2] > rates[3] > rates[4]
    assert rates[4] == pytest.approx(0.1)


def test_a_budget_ends_at_its_nearer_limit():
    budget = Budget(minutes=2, images=100)
    assert budget.progress(60, 10) == 0.5
    assert budget.progress(0, 75) == 0.75


@pytest.mark.parametrize("bad", [{"minutes": 0}, {"images": -1}, {}])
def test_an_empty_budget_is_refused(bad):
    with pytest.raises(ValueError, match="positive"):
        Budget(**bad)
