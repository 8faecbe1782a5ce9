"""Selections choose the same in one launch, whose programs meet, and in a launch a step."""

import pytest
import torch

from vispress_kernels.dpp_select import dpp_select
from vispress_kernels.maxmin_select import maxmin_select

pytest.importorskip("triton")
OPS = {
    "maxmin": lambda x, weight, backend: maxmin_select(x, 6, weight=weight, backend=backend),
    "dpp": lambda x, weight, backend: dpp_select(x, weight, 6, backend=backend),
}


@pytest.fixture(params=OPS)
def agree(request, randn):
    """Whether kernel and reference choose the same, the first of equal tokens."""
    op = OPS[request.param]

    def check():
        # some tokens six times, two side by side in three places; others once, the last heaviest
        x, weight = randn(2, 12, 6), randn(2, 12).abs()
        x = torch.cat([x.repeat_interleave(2, dim=1).repeat(1, 3, 1), randn(2, 36, 6)], dim=1)
        weight = weight.repeat_interleave(2, dim=1).repeat(1, 3)
        weight = torch.cat([weight, randn(2, 36).abs()], dim=1)
        weight[:, -6:] += 2
        order = op(x, weight, "triton")
        assert torch.equal(order, op(x, weight, "torch"))
        copies = order[order < 72]
        assert (copies < 24).all()
        assert (copies % 2 == 0).all()
        assert (order >= 102).any(1).all()

    return check


@pytest.fixture
def streamed(monkeypatch):
    """As beyond 4,096 tokens: products are not held."""
    monkeypatch.setattr("vispress_kernels.maxmin_select.kernel.MOST", 0)


@pytest.mark.slow(cases=2)
def test_held_products(agree):
    agree()


@pytest.mark.slow(cases=2)
# interpreted programs run one after the other: there, one that meets nobody
@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("most", [1, 3] if torch.cuda.is_available() else [1])
def test_programs_of_several_blocks(agree, monkeypatch, most):
    rule = {"BLOCK_N": 8, "BLOCK_D": 64, "num_warps": 4}
    monkeypatch.setattr("vispress_kernels._greedy.together", lambda *_: most)
    monkeypatch.setattr("vispress_kernels._greedy.whole_rule", lambda *_: rule)
    agree()


@pytest.mark.some(cases=2)
@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("blocks", [4, 1024])
def test_a_launch_a_step_chooses_the_same(agree, monkeypatch, blocks):
    # as for more samples than fit on the device; four bests: more than 8 x 1024 tokens
    monkeypatch.setattr("vispress_kernels._greedy.together", lambda *_: 0)
    for module in ("_greedy", "dpp_select.kernel", "maxmin_select.kernel"):
        monkeypatch.setattr(f"vispress_kernels.{module}.MAX_BESTS", blocks)
    agree()
