"""V2Drop: how far a layer moves tokens, and how many it leaves, by hand."""

import pytest
import torch
from tests.methods.helpers import only

from vispress.errors import ConfigError
from vispress.methods import V2Drop
from vispress.types import Stage


def counts(method, size, depth=32):
    return [(p.layer, p.budget.resolve(size)) for p in method.placements(depth)]


def test_worked_example():
    tokens = only(update_norm=torch.tensor([[3.0, 1, 2, 5]]))
    assert V2Drop().plan(tokens, 2).keep.tolist() == [[0, 3]]


def test_published_schedules():
    assert counts(V2Drop(), 576) == [(3, 288), (17, 144), (22, 1)]
    mean = (3 * 576 + 14 * 288 + 5 * 144 + 10) / 32
    assert mean == pytest.approx(202.8, abs=0.1)
    qwen = V2Drop(layers=(3, 16, 22), ratios=(0.25, 0.0125, 0.0))
    assert counts(qwen, 400, 28) == [(3, 100), (16, 5), (22, 1)]
    assert counts(qwen, 3, 28) == [(3, 1), (16, 1), (22, 1)]
    assert all(p.stage is Stage.IN_LLM and p.queries is None for p in V2Drop().placements(32))


def test_budgets():
    assert counts(V2Drop(num_tokens=20), 576) == [(3, 80), (17, 40), (22, 20)]
    # the published mean gives the published schedule
    assert counts(V2Drop(keep_ratio=202.9 / 576), 576) == [(3, 288), (17, 144), (22, 1)]
    assert counts(V2Drop(layers=(4,), ratios=(0.0,)), 576) == [(4, 1)]


@pytest.mark.refusal
def test_bad_hyper_parameters_are_refused():
    for bad in ({"layers": (3, 2, 5)}, {"ratios": (0.5, 0.6, 0.1)}, {"layers": (0, 3, 5)}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            V2Drop(**bad)
