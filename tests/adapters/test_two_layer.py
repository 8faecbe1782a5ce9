"""The projector's weights are handed out only where they say all there is to say."""

import pytest
import torch
from tests.tiny import FAMILIES, build
from torch import nn
from torch.nn.functional import gelu, linear

from vispress.adapters.base import find_adapter

PLAIN = ("llava", "llava_siglip", "llava_next", "llava_onevision")


def adapter_of(family):
    return find_adapter(build(family, dtype=torch.float32))


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_compute_what_the_projector_computes(family):
    adapter = adapter_of(family)
    mlp = adapter.two_layer()
    assert (mlp is not None) == (family in PLAIN)
    if mlp is None:
        return
    x = torch.randn(2, 5, mlp.w1.shape[1])
    approximate = "tanh" if mlp.activation == "gelu_tanh" else "none"
    out = linear(gelu(linear(x, mlp.w1, mlp.b1), approximate=approximate), mlp.w2, mlp.b2)
    torch.testing.assert_close(adapter.project(adapter.projector, x), out)
    assert mlp.to(torch.device("meta")).w2.is_meta


class Wider(nn.Linear):
    """What LoRA and quantisation put in the place of a linear layer."""


def wrap(projector):
    projector.linear_1 = Wider(8, 8)


def change_output(projector):
    projector.register_forward_hook(lambda module, args, out: 2 * out)


def change_input(projector):
    projector.linear_2.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def shadow(projector):
    projector.forward = lambda x: x


def offload(projector):
    projector.linear_1.to("meta")


def other_activation(projector):
    projector.act = nn.ReLU()


def derive(projector):
    projector.__class__ = type("OwnProjector", (type(projector),), {})


@pytest.mark.parametrize(
    "change",
    [wrap, change_output, change_input, shadow, offload, other_activation, derive],
    ids=lambda change: change.__name__,
)
def test_a_changed_projector_has_no_two_layers(change):
    adapter = adapter_of("llava")
    assert adapter.two_layer() is not None
    change(adapter.projector)
    assert adapter.two_layer() is None
