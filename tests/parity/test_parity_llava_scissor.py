"""LLaVA-Scissor against its official code, where that counts every token and link."""

import math

import pytest
import torch
from tests.parity.vectors import close, load

from vispress.methods import LLaVAScissor
from vispress.methods.llava_scissor import join, mean_of, values

WHOLE = [name for name in load("llava_scissor") if not name.startswith(("sampled", "long_chains"))]


@pytest.mark.parametrize("name", WHOLE)
def test_joins_what_the_official_code_joins(name):
    case = load("llava_scissor")[name]
    x = case["in/features"]
    F, t, _ = x.shape
    assert not case["out/lost_first"]
    assert not case["out/lost_second"]
    assert math.log(t) / case["param/epsilon"] ** 2 > t  # every link is looked at
    tau = LLaVAScissor(tau=case["param/tau"]).tau
    joined, flat = join(x, tau), x.flatten(0, 1)
    # theirs are numbered by frame
    before = case["out/components_per_frame"].cumsum(0) - case["out/components_per_frame"]
    assert torch.equal(joined.first.view(F, t), case["out/frame_component"] + before[:, None])
    assert torch.equal(joined.second, case["out/second_component"])
    assert len(joined.keep) == case["out/num_tokens"]
    means = mean_of(flat, joined.first, len(joined.second), "torch")
    close(means, case["out/first_tokens"])
    results = mean_of(means, joined.second, len(joined.keep), "torch")
    close(results, case["out/selected_tokens"])
    close(values(flat, joined), case["out/tokens"])
