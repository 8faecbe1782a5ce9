"""CoViPAL's first stage: states before layers, and a deeper layer's attention as their target."""

from typing import Any

import pytest
import torch
from tests.distillation.test_targets import Fed
from torch import nn

from vispress.budget import Budget
from vispress.distillation.distil import distil
from vispress.distillation.layer_attention import (
    LayersHeard,
    guide_layer,
    layer_loss,
    listen_at,
)
from vispress.errors import ConfigError
from vispress.methods import CoViPAL
from vispress.types import ModuleShape


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_states_are_hidden_states_and_targets_attention_maps(family: str) -> None:
    fed = Fed(family)
    heard = list(listen_at(fed, range(2), (1, 3), batch_size=1))  # type: ignore[arg-type]
    assert len(heard) == 3
    found, read = iter(heard), guide_layer(6, 3)
    for number in range(2):
        inputs = fed.encode([number])
        with torch.no_grad():
            out: Any = fed.model(
                **inputs, output_attentions=True, output_hidden_states=True, use_cache=False
            )
        visual = inputs["input_ids"][0] == fed.model.config.image_token_id
        places = visual.nonzero()[:, 0]
        for run in places.tensor_split((places.diff() != 1).nonzero()[:, 0] + 1):
            one = next(found)
            asks = [p for p in range(int(run[-1]) + 1, len(visual)) if not visual[p]]
            mass = out.attentions[read][0][:, asks][..., run].sum(dim=(0, 1))
            assert torch.allclose(one.target, mass / mass.sum(), atol=1e-5)
            for layer in (1, 3):
                features, text = one.states[layer]
                assert torch.allclose(features, out.hidden_states[layer][0, run], atol=1e-5)
                assert torch.allclose(text, out.hidden_states[layer][0, asks], atol=1e-5)


def test_the_guide_lies_two_thirds_down_and_not_above_what_prunes() -> None:
    assert guide_layer(32, 16) == 21
    assert guide_layer(6, 3) == 4
    assert guide_layer(6, 1) == 4
    assert guide_layer(32, 28) == 28
    with pytest.raises(ConfigError, match="layer 5 or a deeper one, below the last of 6"):
        guide_layer(6, 5)


class Table(nn.Module):
    """Scores by heart, one row a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]]))

    def forward(self, layer: int, features: Any, text: Any, valid: Any) -> torch.Tensor:
        assert text.shape[:2] == valid.shape
        assert (valid.sum(1) == torch.tensor([2, 1])).all()
        return self.rows[layer - 1].expand(len(features), -1)


def test_both_losses_are_their_formulas() -> None:
    """Of three tokens two are members before layer 1 and one before layer 2."""
    shares = (torch.tensor([0.2, 0.7, 0.1]), torch.tensor([0.5, 0.1, 0.4]))
    batch = [
        LayersHeard({n: (torch.zeros(3, 4), torch.zeros(2 - i, 4)) for n in (1, 2)}, target)
        for i, target in enumerate(shares)
    ]
    budgets, table = {1: Budget(num_tokens=2), 2: Budget(num_tokens=1)}, Table()
    members = {1: [[1.0, 1, 0], [1.0, 0, 1]], 2: [[0.0, 1, 0], [1.0, 0, 0]]}
    by_hand = torch.stack([
        -(torch.tensor(members[n]) * row.sigmoid().log()
          + (1 - torch.tensor(members[n])) * (1 - row.sigmoid()).log()).mean()
        for n, row in zip((1, 2), table.rows, strict=True)
    ]).mean()  # fmt: skip
    assert torch.allclose(layer_loss(budgets, "members", table, batch), by_hand, atol=1e-6)
    diverges = torch.stack([
        torch.stack([(s * (s.log() - row.log_softmax(0))).sum() for s in shares]).mean()
        for row in table.rows
    ]).mean()  # fmt: skip
    assert torch.allclose(layer_loss(budgets, "shares", table, batch), diverges, atol=1e-6)


def test_every_network_learns_what_is_held_out() -> None:
    """The target follows one feature, up or down as the text says."""
    method = CoViPAL(layers=(1, 2), num_tokens=2, width=16, heads=2)
    torch.manual_seed(0)
    module = method.make_module(
        ModuleShape(width=8, vision_width=8, num_layers=4, num_heads=2, vision_layers=2)
    )
    generator, heard = torch.Generator().manual_seed(0), list[LayersHeard]()
    for place in range(120):
        x, text = (torch.randn(n, 8, generator=generator) for n in (6, 2))
        text[:, 0] = 3 * (-1) ** place
        target = (2 * x[:, 0] * text[0, 0].sign()).softmax(0)
        heard.append(LayersHeard({1: (x, text), 2: (x + 1, text)}, target))
    budgets = {one.layer: one.budget for one in method.placements(4)}

    def loss(network: nn.Module, batch: Any) -> torch.Tensor:
        return layer_loss(budgets, "members", network, batch)

    curve = distil(module, heard, loss=loss, steps=60, batch=32, lr=1e-2)
    before, after = curve.held_out
    assert after < 0.7 * before
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())
