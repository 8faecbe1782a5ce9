"""LLaVA-Scissor: components of frames and of a video, by hand."""

from dataclasses import replace

import pytest
import torch
from tests.methods.helpers import anyres, make_tokens, only

from vispress.errors import ConfigError
from vispress.methods import LLaVAScissor
from vispress.methods.llava_scissor import components, join, values


def angles(*degrees):
    a = torch.tensor(degrees).deg2rad()
    return torch.stack([a.cos(), a.sin()], dim=-1)


EXAMPLE = angles([0.0, 20, 90], [10, 95, 180])


def test_worked_example():
    tokens = only(features=EXAMPLE.flatten(0, 1)[None], grid=(2, 1, 3))
    plan = LLaVAScissor().plan(tokens, 6)
    # {0, 20, 10}, {90, 95} and {180}, which stand at 0, 90 and 180 degrees
    assert plan.keep.tolist() == [[0, 2, 5]]
    expected = torch.tensor([[0.9755, 0.1720], [-0.0436, 0.9981], [-1.0, 0]])
    torch.testing.assert_close(plan.features[0], expected, atol=1e-4, rtol=0)


def test_components_are_chains_and_stand_at_their_best_connected():
    linked = torch.eye(6, dtype=torch.bool)
    for a, b in ((0, 4), (4, 2), (2, 5), (1, 3)):
        linked[a, b] = linked[b, a] = True
    # degrees of 4 and 2 are equal: the first
    assert components(linked[None]).tolist() == [[2, 1, 2, 1, 2, 2]]
    long = torch.eye(150, dtype=torch.bool)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    long[order[1:], order[:-1]] = long[order[:-1], order[1:]] = True
    assert len(components(long[None]).unique()) == 1


def test_where_nothing_joins_values_stay():
    x = torch.eye(8).view(2, 4, 8) * 3
    joined = join(x, 0.9)
    assert joined.keep.tolist() == list(range(8))
    torch.testing.assert_close(values(x.flatten(0, 1), joined), x.flatten(0, 1))


def test_order_inside_a_frame_changes_no_value():
    x = make_tokens(1, grid=(3, 3, 4)).features[0].view(3, 12, -1)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    ours, theirs = (values(y.flatten(0, 1), join(y, 0.4)) for y in (x, x[:, order]))
    near = torch.cdist(ours, theirs).amin(dim=1)
    assert len(ours) == len(theirs) < 36
    assert float(near.max()) < 1e-5


def test_equal_tokens_are_one():
    tokens = only(features=torch.ones(1, 12, 4), grid=(3, 2, 2))
    plan = LLaVAScissor().plan(tokens, 12)
    assert plan.keep.tolist() == [[0]]
    torch.testing.assert_close(plan.features, torch.ones(1, 1, 4))


@pytest.mark.parametrize("num_keep", [1, 5, 20])
def test_a_budget_lowers_the_threshold(num_keep):
    tokens = make_tokens(2, grid=(3, 3, 4))
    plan = LLaVAScissor(num_tokens=num_keep).plan(tokens, num_keep)
    free = LLaVAScissor().plan(tokens, 36)
    assert max(plan.counts) <= num_keep < min(free.counts)
    assert min(plan.counts) >= num_keep // 3


def test_newlines_stay():
    crops = anyres(side=3, rows=1, cols=2)
    crops = replace(crops, thumbnail=False)
    tokens = make_tokens(1, crops=crops)
    plan = LLaVAScissor(num_tokens=9).plan(tokens, 9)
    newline = torch.where(crops.segment < 0)[0]
    assert torch.isin(newline, plan.keep[0]).all()
    slots = torch.searchsorted(plan.keep[0], newline)
    assert torch.equal(plan.features[0, slots], tokens.features[0, newline])


@pytest.mark.refusal
def test_bad_hyper_parameters_are_refused():
    with pytest.raises(ConfigError, match="tau"):
        LLaVAScissor(tau=1.5)
