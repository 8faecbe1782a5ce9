"""XAI compression by hand: the convolution, its scale, what it learns, and where it acts."""

import dataclasses

import pytest
import torch
from tests.methods.helpers import make_tokens

from vispress.errors import ConfigError
from vispress.methods import XAICompress
from vispress.methods.xai_compress import CHANNELS, RelevanceConv, Separable
from vispress.types import ModuleShape, Queries, Stage

SHAPE = ModuleShape(width=8, vision_width=6, num_layers=4, num_heads=2, vision_layers=2)


def test_a_layer_mixes_tokens_then_channels():
    layer = Separable(2, 3, 3)
    torch.nn.init.normal_(layer.across.bias)
    x = torch.randn(1, 4, 2)
    padded = torch.cat([x[:, :1], x, x[:, -1:]], dim=1)
    along = sum(padded[:, i : i + 4] * layer.along[:, 0, i] for i in range(3))
    expected = (along @ layer.across.weight.mT + layer.across.bias).relu()
    torch.testing.assert_close(layer(x), expected)


def test_it_has_the_papers_size():
    module = XAICompress(keep_ratio=0.5).make_module(SHAPE)
    assert len(module.layers) == len(CHANNELS) == 5
    assert sum(p.numel() for p in module.parameters()) == pytest.approx(0.18e6, rel=0.05)


def test_the_unit_of_attention_does_not_matter():
    module, attention = RelevanceConv(CHANNELS, 3), torch.rand(2, 7)
    torch.testing.assert_close(module(attention), module(attention * 1e-4), rtol=1e-4, atol=1e-5)
    nothing = module(torch.zeros(1, 7))
    torch.testing.assert_close(nothing, module(torch.ones(1, 7)))
    assert module(torch.rand(1, 1)).shape == (1, 1)


def test_the_most_relevant_stay():
    tokens = make_tokens(batch=1, grid=(1, 2, 3))
    method = XAICompress(num_tokens=2)
    given = []

    def module(attention):
        given.append(attention)
        return torch.tensor([[0.1, 3.0, -1.0, 0.3, 2.0, 0.0]])

    tokens = dataclasses.replace(tokens, module=module)
    assert method.plan(tokens, 2).keep.tolist() == [[1, 4]]
    assert torch.equal(given[0], tokens.mean_attention)


def test_it_acts_before_the_llm_and_reads_its_first_layer():
    (at,) = XAICompress(keep_ratio=0.5).placements(32)
    assert (at.stage, at.layer, at.probe, at.queries) == (Stage.PRE_LLM, 0, 0, Queries.TEXT_AFTER)
    with pytest.raises(ConfigError, match="kernel must be odd, got 4"):
        XAICompress(keep_ratio=0.5, kernel=4)


def test_it_learns_where_relevance_lies():
    """Two tokens beside the most attended one are relevant: a few steps find that."""
    torch.manual_seed(0)
    module = RelevanceConv((16, 16), 3)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)

    def batch():
        peak = torch.randint(1, 11, (32,), generator=generator)
        attention = 0.1 * torch.rand(32, 12, generator=generator)
        attention[torch.arange(32), peak] = 1.0
        target = torch.zeros(32, 12)
        target[torch.arange(32), peak - 1] = target[torch.arange(32), peak + 1] = 0.5
        return attention, target

    for _ in range(150):
        attention, target = batch()
        loss = torch.nn.functional.kl_div(
            module(attention).log_softmax(-1), target, reduction="batchmean"
        )
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in module.parameters())
        optimizer.step()
    attention, target = batch()
    best = module(attention).topk(2).indices.sort().values
    assert torch.equal(best, target.topk(2).indices.sort().values)
